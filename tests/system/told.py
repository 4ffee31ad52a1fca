"""A container whose program does what it is told, a line at a time."""

from tests.conftest import python


class Told:
    """@code reads lines and answers each with a line. @options: those of graft run."""

    def __init__(self, lab, code, *options):
        self.process = lab.spawn_graft(*options, *python(code), stdin=-1, stdout=-1)

    def say(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def does(self, *words):
        self.say(*words)
        return self.hear()

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0
