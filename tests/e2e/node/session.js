// Two connections of the npm package `ws` go through the session of PROTOCOL §5: node session.js URL
// Prints one line of JSON per message, with the name of the connection that received it.
'use strict';
const WebSocket = require('ws');

const [url] = process.argv.slice(2);

function open(name, onMessage) {
  const socket = new WebSocket(url, ['fastsig.v1.json'], { handshakeTimeout: 5000 });
  socket.on('message', (data, isBinary) => {
    const message = JSON.parse(data.toString());
    console.log(JSON.stringify({ name, isBinary, message }));
    onMessage(message, socket);
  });
  socket.on('error', (error) => { console.error(`${name}: ${error.message}`); process.exit(1); });
  return socket;
}

const first = open('client1', (message) => {
  if (message.type === 'joined') startSecond();
  if (message.type === 'offer') { second.close(1000); }
  if (message.type === 'peer-left') first.close(1000);
});
first.on('open', () => {
  console.log(JSON.stringify({ name: 'client1', protocol: first.protocol, extensions: first.extensions }));
  first.send(JSON.stringify({ type: 'join', room: 'node-room', sender: 'client1' }));
});

let second;
function startSecond() {
  second = open('client2', (message) => {
    if (message.type === 'joined') {
      second.send(JSON.stringify({
        type: 'offer', room: 'node-room', sender: 'client2', recipient: 'client1', payload: { sdp: 'example SDP data' },
      }));
    }
  });
  second.on('open', () => second.send(JSON.stringify({ type: 'join', room: 'node-room', sender: 'client2' })));
}
setTimeout(() => { console.error('not done in 10 s'); process.exit(1); }, 10000).unref();
