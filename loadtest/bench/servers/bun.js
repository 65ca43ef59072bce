// Signaling server on Bun (its WebSocket is uWebSockets, C++). Run: bun bun.js PORT
const port = Number(process.argv[2] || 8080);
const rooms = new Map(); // room -> Map(id -> ws)

function leave(ws) {
  const { room, id } = ws.data;
  if (room === null) return;
  const members = rooms.get(room);
  if (members !== undefined && members.get(id) === ws) {
    members.delete(id);
    ws.unsubscribe(room);
    if (members.size === 0) rooms.delete(room);
    else server.publish(room, JSON.stringify({ type: "peer-left", room, sender: id }));
  }
  ws.data.room = null;
}

function join(ws, room, id) {
  leave(ws);
  let members = rooms.get(room);
  if (members === undefined) rooms.set(room, (members = new Map()));
  const old = members.get(id);
  if (old !== undefined) { leave(old); old.close(4000, "replaced"); rooms.set(room, members); }
  members.set(id, ws);
  ws.data.room = room;
  ws.data.id = id;
  ws.send(JSON.stringify({ type: "joined", room, sender: id }));
  ws.subscribe(room);
  ws.publish(room, JSON.stringify({ type: "peer-joined", room, sender: id }));
}

const server = Bun.serve({
  hostname: "127.0.0.1",
  port,
  fetch(req, server) {
    if (server.upgrade(req, { data: { room: null, id: null } })) return;
    return new Response("websocket only", { status: 426 });
  },
  websocket: {
    perMessageDeflate: false,
    sendPings: true,
    maxPayloadLength: 256 * 1024,
    message(ws, raw) {
      let m;
      try { m = JSON.parse(raw); } catch { return; }
      if (m.type === "join") return join(ws, String(m.room), String(m.sender));
      if (ws.data.room !== m.room) return;
      if (m.type === "leave") return leave(ws);
      if (m.recipient !== undefined) rooms.get(m.room)?.get(m.recipient)?.send(raw);
      else ws.publish(m.room, raw);
    },
    close(ws) { leave(ws); },
  },
});
