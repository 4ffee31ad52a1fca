"use strict";

// What graftd tells of the containers, once a second, as a picture and as tables. Nothing is sent but the question.

const SVG = "http://www.w3.org/2000/svg";
const PERIOD = 1000;
const OUTSIDE = "outside";
const view = { state: null, before: null, chosen: "", filter: "" };
const find = (selector) => document.querySelector(selector);

function amount(bytes) {
  const units = ["", "K", "M", "G", "T"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return (unit && bytes < 10 ? bytes.toFixed(1) : bytes.toFixed(0)) + units[unit];
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const refusals = (one) => one.refused.reduce((sum, each) => sum + each.count, 0);

function rate(one, field) {
  const old = view.before?.containers.find((each) => each.id === one.id);
  return old ? Math.max(0, (one[field] - old[field]) / view.seconds) : 0;
}

function shown() {
  return view.state.containers.filter((one) => one.name.includes(view.filter));
}

function choose(name) {
  view.chosen = view.chosen === name ? "" : name;
  draw();
}

function drawTable() {
  const body = find("#containers tbody");
  body.replaceChildren(...shown().map((one) => {
    const row = element("tr", "", { "data-name": one.name, class: one.name === view.chosen ? "chosen" : "" });
    const cells = [one.name, one.open_in + one.open_out, amount(rate(one, "received")), amount(rate(one, "sent")), refusals(one)];
    row.append(...cells.map((cell) => element("td", cell)));
    if (refusals(one)) row.lastChild.className = "bad";
    row.addEventListener("click", () => choose(one.name));
    return row;
  }));
}

function drawDetails() {
  const one = view.state.containers.find((each) => each.name === view.chosen);
  find("#details").hidden = !one;
  if (!one) return;
  find("#details h2").textContent = one.name;
  const mean = one.trapped_calls ? `, ${(one.trapped_call_seconds / one.trapped_calls * 1e6).toFixed(0)} us each` : "";
  const facts = {
    kind: one.kind + (one.direct ? ", direct" : ""),
    command: one.command,
    since: new Date(one.started * 1000).toLocaleString(),
    ports: one.publish.join(", "),
    addresses: one.addresses.join(", "),
    endpoints: one.endpoints.join(", "),
    rules: one.rules.join(", "),
    sockets: `${one.sockets}, ${one.datagram_sockets} of UDP`,
    connections: `${one.accepted} in, ${one.connected} out; open ${one.open_in} in, ${one.open_out} out`,
    bytes: `${amount(one.received)} received, ${amount(one.sent)} sent`,
    calls: `${one.trapped_calls}${mean}`,
    limit: one.rate ? `${amount(one.rate)}/s for each socket` : "",
    refused: one.refused.map((each) => `${each.op}: ${each.reason} (${each.count})`).join(", "),
  };
  const list = Object.entries(facts).filter(([, value]) => value);
  find("#details dl").replaceChildren(...list.flatMap(([key, value]) => [element("dt", key), element("dd", value)]));
}

function places(names, width, height) {
  const found = new Map([[OUTSIDE, [width / 2, height / 2]]]);
  names.forEach((name, n) => {
    const angle = 2 * Math.PI * n / names.length - Math.PI / 2;
    found.set(name, [width / 2 + 0.4 * width * Math.cos(angle), height / 2 + 0.4 * height * Math.sin(angle)]);
  });
  return found;
}

function drawPicture() {
  const svg = find("#links");
  const { width, height } = svg.getBoundingClientRect();
  const containers = shown();
  const at = places(containers.map((one) => one.name), width, height);
  const parts = [];
  for (const link of view.state.links) {
    const [from, to] = [at.get(link.from || OUTSIDE), at.get(link.to || OUTSIDE)];
    if (!from || !to) continue;
    const old = view.before?.links.find((each) => each.from === link.from && each.to === link.to);
    const moved = old ? link.sent + link.received - old.sent - old.received : 0;
    const path = from === to
      ? `M ${from[0]} ${from[1]} c 60 -60 60 60 0 0`
      : `M ${from[0]} ${from[1]} Q ${(from[0] + to[0]) / 2 + 20} ${(from[1] + to[1]) / 2 + 20} ${to[0]} ${to[1]}`;
    const line = drawn("path", { d: path, class: moved > 0 ? "link" : "link idle", "data-from": link.from, "data-to": link.to });
    line.setAttribute("stroke-width", Math.min(8, 1 + Math.log10(1 + Math.max(0, moved)) / 1.2));
    line.append(drawn("title", {}));
    line.firstChild.textContent = `${link.from || OUTSIDE} to ${link.to || OUTSIDE}: ${link.connections} connections`;
    parts.push(line);
  }
  const nodes = [{ name: OUTSIDE }, ...containers];
  for (const one of nodes) {
    const [x, y] = at.get(one.name);
    const bad = one.refused && refusals(one) ? " bad" : "";
    const node = drawn("g", { class: `node${bad}${one.name === view.chosen ? " chosen" : ""}`, "data-name": one.name });
    node.append(drawn("circle", { cx: x, cy: y, r: containers.length > 60 ? 5 : 12 }));
    if (containers.length <= 60 || one.name === view.chosen || one.name === OUTSIDE) {
      const text = drawn("text", { x, y: y + 26 });
      text.textContent = one.name;
      node.append(text);
    }
    if (one.refused) node.addEventListener("click", () => choose(one.name));
    parts.push(node);
  }
  svg.replaceChildren(...parts);
}

function drawLog() {
  const lines = view.state.log.filter((line) => !view.chosen || line.container === view.chosen).reverse();
  find("#log ol").replaceChildren(...lines.map((line) => {
    const at = new Date(line.time * 1000).toLocaleTimeString();
    const what = [line.op, line.protocol, line.asked].filter(Boolean).join(" ");
    return element("li", `${at} ${line.container} ${line.command}[${line.pid}] ${what}: ${line.errno}, ${line.rule}`);
  }));
}

function draw() {
  if (!view.state) return;
  const count = view.state.containers.length;
  const open = view.state.containers.reduce((sum, one) => sum + one.open_in + one.open_out, 0);
  find("#summary").textContent = `${count} containers, ${open} open connections`;
  drawTable();
  drawDetails();
  drawPicture();
  drawLog();
}

async function look() {
  try {
    const answer = await fetch("state", { cache: "no-store" });
    if (!answer.ok) throw new Error(`graftd says ${answer.status}`);
    const state = await answer.json();
    const now = performance.now() / 1000;
    view.before = view.state;
    view.seconds = now - (view.at ?? now - 1);
    view.at = now;
    view.state = state;
    draw();
  } catch (error) {
    find("#summary").textContent = `no answer: ${error.message}`;
  }
  setTimeout(look, PERIOD);
}

find("#filter").addEventListener("input", (event) => { view.filter = event.target.value; draw(); });
window.addEventListener("resize", draw);
look();
