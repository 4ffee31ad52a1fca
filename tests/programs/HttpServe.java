import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.net.NetworkInterface;
import java.util.Collections;

/** The JDK's HTTP server; answers with the names of the network interfaces it sees. */
public class HttpServe {
    public static void main(String[] args) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress(80), 0);
        server.createContext("/", exchange -> {
            StringBuilder names = new StringBuilder();
            for (NetworkInterface i : Collections.list(NetworkInterface.getNetworkInterfaces())) {
                names.append(i.getName()).append(' ');
            }
            byte[] body = names.toString().getBytes();
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }
}
