// A small HTTP service on vast-client: resolves one chain per GET /vast, answers JSON.
//
// usage: node peer.js PORT TAG_URL shipped|agent
//
// "shipped" takes the client's own fetching (Node's fetch); "agent" gives it a URL handler, as
// its documentation provides for, over node:http with one keep-alive agent. The timeout is the
// deadline that vastproxy is given too.

import http from "node:http";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const { VASTClient } = require("@dailymotion/vast-client");
const { DOMParser } = createRequire(require.resolve("@dailymotion/vast-client"))("@xmldom/xmldom");

const TIMEOUT_MS = 2000;
const [port, tag, fetching] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true });

function parsed(response, done) {
  const chunks = [];
  response.on("data", (chunk) => chunks.push(chunk));
  response.on("error", (error) => done({ error }));
  response.on("end", () => {
    const text = Buffer.concat(chunks).toString("utf8");
    const xml = new DOMParser().parseFromString(text, "text/xml");
    done({ xml, details: { byteLength: text.length, statusCode: 200, rawXml: text } });
  });
}

const overAgent = {
  get(url) {
    return new Promise((done) => {
      http
        .get(url, { agent, timeout: TIMEOUT_MS }, (response) => parsed(response, done))
        .on("timeout", function () {
          this.destroy(new Error("timed out"));
        })
        .on("error", (error) => done({ error }));
    });
  },
};

const options = { timeout: TIMEOUT_MS, ...(fetching === "agent" && { urlHandler: overAgent }) };

async function answer(response) {
  // A client holds the state of one resolution: every request has its own.
  const vast = await new VASTClient().get(tag, { ...options });
  const body = Buffer.from(JSON.stringify(vast));
  response.writeHead(200, { "Content-Type": "application/json", "Content-Length": body.length });
  response.end(body);
}

const server = http.createServer((request, response) => {
  request.resume();
  answer(response).catch((error) => {
    response.writeHead(502, { "Content-Length": 0 });
    response.end();
    console.error(error);
  });
});
server.listen(Number(port), "127.0.0.1");
process.on("SIGTERM", () => process.exit(0));
