// Runs the page's side of docs/calls.md against a peer connection that goes through these states, and prints the reports.
// node report.js DOCS/CALLS.MD '[[milliseconds, state or "restart"], …]'
const [, , page, said] = process.argv;
const code = require("node:fs").readFileSync(page, "utf8").match(/```js\n([\s\S]*?)```/)[1];

let now = 0;
const reports = [];
const socket = { send: (text) => reports.push(JSON.parse(text).payload) };
const pc = Object.assign(new EventTarget(), { connectionState: "new", getStats: async () => new Map() });
const clock = { now: () => now };
const names = ["performance", "room", "peer", "socket", "pc"];
const begin = new Function(...names, `${code}\nreturn begin;`)(clock, "r", "p", socket, pc);

(async () => {
  for (const [at, state] of JSON.parse(said)) {
    now = at;
    if (state === "restart") {
      begin();
      continue;
    }
    pc.connectionState = state;
    pc.dispatchEvent(new Event("connectionstatechange"));
    await new Promise(setImmediate);
  }
  console.log(JSON.stringify(reports));
})();
