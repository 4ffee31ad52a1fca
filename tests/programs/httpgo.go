// httpgo: an HTTP server and client in one static program: `httpgo serve ADDR`, `httpgo get URL COUNT KEEPALIVE`.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s", r.RemoteAddr)
		})
		panic(http.ListenAndServe(os.Args[2], nil))
	}
	count, _ := strconv.Atoi(os.Args[3])
	transport := &http.Transport{DisableKeepAlives: os.Args[4] == "false"}
	client := &http.Client{Transport: transport}
	seen := map[string]bool{}
	for i := 0; i < count; i++ {
		response, err := client.Get(os.Args[2])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		seen[string(body)] = true
	}
	fmt.Println(len(seen))
}
