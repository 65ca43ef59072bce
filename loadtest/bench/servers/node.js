// Signaling server on Node.js + ws. Run: node node.js PORT   (NODE_PATH points to node_modules)
const { WebSocketServer } = require("ws");
const port = Number(process.argv[2] || 8080);
const rooms = new Map(); // room -> Map(id -> ws)
const TEXT = { binary: false };

function broadcast(members, except, data) {
  for (const ws of members.values()) if (ws !== except && ws.readyState === 1) ws.send(data, TEXT);
}

function leave(ws) {
  if (ws.room === null) return;
  const members = rooms.get(ws.room);
  if (members !== undefined && members.get(ws.id) === ws) {
    members.delete(ws.id);
    if (members.size === 0) rooms.delete(ws.room);
    else broadcast(members, ws, JSON.stringify({ type: "peer-left", room: ws.room, sender: ws.id }));
  }
  ws.room = null;
}

function join(ws, room, id) {
  leave(ws);
  let members = rooms.get(room);
  if (members === undefined) rooms.set(room, (members = new Map()));
  const old = members.get(id);
  if (old !== undefined) { old.room = null; old.close(4000, "replaced"); }
  members.set(id, ws);
  ws.room = room;
  ws.id = id;
  ws.send(JSON.stringify({ type: "joined", room, sender: id }));
  broadcast(members, ws, JSON.stringify({ type: "peer-joined", room, sender: id }));
}

const wss = new WebSocketServer({
  host: "127.0.0.1", port, backlog: 4096, perMessageDeflate: false, maxPayload: 256 * 1024,
});
wss.on("connection", (ws, req) => {
  req.socket.setNoDelay(true);
  ws.room = ws.id = null;
  ws.on("message", (raw, isBinary) => {
    if (isBinary) return;
    let m;
    try { m = JSON.parse(raw); } catch { return; }
    if (m.type === "join") return join(ws, String(m.room), String(m.sender));
    if (ws.room !== m.room) return;
    if (m.type === "leave") return leave(ws);
    const members = rooms.get(m.room);
    if (m.recipient !== undefined) {
      const to = members.get(m.recipient);
      if (to !== undefined && to.readyState === 1) to.send(raw, TEXT);
    } else broadcast(members, ws, raw);
  });
  ws.on("close", () => leave(ws));
  ws.on("error", () => ws.terminate());
});
