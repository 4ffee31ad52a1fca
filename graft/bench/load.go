// SPDX-License-Identifier: Apache-2.0

// load.go - what load.c does, as a static Go program: no library can be preloaded into it, and its runtime polls
//
// usage: load-go serve PORT                       TCP server: accept and close
//
//	load-go reply PORT                       TCP server: 100 bytes there and back, and close
//	load-go connect ADDR PORT COUNT WORKERS  connect and reset COUNT times in each worker; prints us for each
//	load-go request ADDR PORT COUNT WORKERS  connect, 100 bytes there and back, close
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"
)

const size = 100

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "load-go:", err)
		os.Exit(1)
	}
}

func number(text string) int {
	found, err := strconv.Atoi(text)
	check(err)
	return found
}

func serve(port string, answer func(net.Conn)) {
	listener, err := net.Listen("tcp4", ":"+port)
	check(err)
	for {
		accepted, err := listener.Accept()
		check(err)
		go answer(accepted)
	}
}

func hangUp(client net.Conn) {
	client.Close()
}

func reply(client net.Conn) {
	text := make([]byte, size)
	if _, err := io.ReadFull(client, text); err == nil {
		client.Write(text)
	}
	client.Close()
}

func connect(address string) error {
	server, err := net.Dial("tcp4", address)
	if err != nil {
		return err
	}
	server.(*net.TCPConn).SetLinger(0)
	return server.Close()
}

func request(address string) error {
	server, err := net.Dial("tcp4", address)
	if err != nil {
		return err
	}
	defer server.Close()
	if _, err = server.Write(make([]byte, size)); err != nil {
		return err
	}
	text, err := io.ReadAll(server)
	if err == nil && len(text) != size {
		err = fmt.Errorf("%d bytes", len(text))
	}
	return err
}

func repeat(each func(string) error, address string, count, workers int) {
	began := time.Now()
	ended := make(chan error)
	for n := 0; n < workers; n++ {
		go func() {
			for n := 0; n < count; n++ {
				if err := each(address); err != nil {
					ended <- err
					return
				}
			}
			ended <- nil
		}()
	}
	for n := 0; n < workers; n++ {
		check(<-ended)
	}
	fmt.Printf("%.3f\n", float64(time.Since(began).Nanoseconds())/1e3/float64(count*workers))
}

func main() {
	servers := map[string]func(net.Conn){"serve": hangUp, "reply": reply}
	clients := map[string]func(string) error{"connect": connect, "request": request}
	if len(os.Args) == 3 && servers[os.Args[1]] != nil {
		serve(os.Args[2], servers[os.Args[1]])
	}
	if len(os.Args) != 6 || clients[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: load-go serve|reply PORT | connect|request ADDR PORT COUNT WORKERS")
		os.Exit(2)
	}
	repeat(clients[os.Args[1]], net.JoinHostPort(os.Args[2], os.Args[3]), number(os.Args[4]), number(os.Args[5]))
}
