"""Each container has its share of connections inside netns, and all have what is common."""

from graft.daemon import shares
from graft.daemon.shares import Common, Share
from graft.process.bucket import Bucket


def fill(share, now=0.0):
    """How many more connections a container gets at once."""
    count = 0
    while share.may(now):
        share.take(now)
        share.count(share.open + 1)
        count += 1
    return count


def test_a_bucket():
    bucket = Bucket(10.0, 5.0)
    assert bucket.level(100.0) == 5
    bucket.take(7.0)
    assert bucket.level(100.0) == -2
    assert bucket.level(100.5) == 3
    assert bucket.level(200.0) == 5


def test_one_container_has_a_limit():
    share = Share(Common())
    assert fill(share) == shares.EACH
    share.count(shares.EACH - 1)
    assert not share.may(0.0), "its rate is used up"
    assert share.may(1.0)


def test_what_is_common_is_counted_once():
    common = Common()
    share = Share(common)
    for open_, beyond in ((shares.SURE, 0), (shares.SURE + 5, 5), (shares.SURE + 2, 2), (3, 0), (200, 184), (0, 0)):
        share.count(open_)
        assert common.beyond == beyond


def test_others_take_all_connections():
    common = Common()
    common.beyond = shares.COMMON
    assert fill(Share(common)) == shares.SURE


def test_others_take_all_of_the_rate():
    common = Common()
    common.bucket.take(10 * shares.COMMON_BURST)
    share = Share(common)
    assert fill(share) == shares.SURE_BURST
    share.count(0)
    assert fill(share, 1.0) == shares.SURE_RATE


def test_a_start_is_paid_for():
    """Also where that is more than a container has for sure."""
    share = Share(Common())
    share.take(0.0, shares.START_PRICE)
    assert fill(share) == shares.EACH_BURST - shares.START_PRICE
