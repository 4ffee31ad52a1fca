// A UDP server and its clients, unconnected and connected: who sees whom.
import java.net.*;

public class Datagrams {
    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[0]);
        DatagramSocket server = new DatagramSocket(port);
        Thread thread = new Thread(() -> {
            try {
                while (true) {
                    DatagramPacket packet = new DatagramPacket(new byte[99], 99);
                    server.receive(packet);
                    byte[] answer = ("answer of " + packet.getAddress().getHostAddress()).getBytes();
                    server.send(new DatagramPacket(answer, answer.length, packet.getSocketAddress()));
                }
            } catch (java.io.IOException end) {
            }
        });
        thread.start();
        InetAddress loopback = InetAddress.getByName("127.0.0.1");
        for (boolean connect : new boolean[] {false, true}) {
            try (DatagramSocket client = new DatagramSocket()) {
                client.setSoTimeout(5000);
                if (connect)
                    client.connect(loopback, port);
                client.send(new DatagramPacket(new byte[1], 1, loopback, port));
                DatagramPacket answer = new DatagramPacket(new byte[99], 99);
                client.receive(answer);
                System.out.println(answer.getAddress().getHostAddress() + " " + answer.getPort() + " "
                    + new String(answer.getData(), 0, answer.getLength()));
            }
        }
        server.close();
    }
}
