// Drives the official PocketBase SDK: one JSON command per line on standard input, one JSON
// report per line on standard output. Knows nothing of the server beyond the SDK's own API.
import readline from "node:readline";
import PocketBase from "pocketbase";
import { EventSource } from "eventsource";

globalThis.EventSource = EventSource;

const report = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const pb = new PocketBase(process.argv[2]);
pb.autoCancellation(false);

// The five lines that make the SDK resumable, as the README gives them.
async function resume() {
  let at = "";
  const build = pb.buildURL.bind(pb);
  pb.buildURL = (path) =>
    build(path) + (path === "/api/realtime" && at ? "?lastEventId=" + at : "");
  pb.realtime.onDisconnect = (topics) => {
    report({ report: "disconnect", topics });
    if (!topics.length) at = "";
  };
  await new Promise((go, fail) =>
    pb.realtime.subscribe("PB_CURSOR", (e) => { at = e.id; go(); }).catch(fail));
  await pb.realtime.subscribe("PB_RESYNC", (e) => report({ report: "resync", ...e }));
}

const commands = {
  token: ({ token }) => pb.authStore.save(token, null),
  subscribe: async ({ collection, topic, options, as }) => {
    await pb.collection(collection).subscribe(
      topic,
      (e) => report({ report: "event", as: as ?? topic, action: e.action, record: e.record }),
      options ?? {},
    );
  },
  unsubscribe: ({ collection, topic }) => pb.collection(collection).unsubscribe(topic),
  login: async ({ collection, identity, password }) => {
    await pb.collection(collection).authWithPassword(identity, password);
  },
  resume,
  connects: async () => {
    await pb.realtime.subscribe("PB_CONNECT", (e) => report({ report: "connect", ...e }));
  },
  exit: () => process.exit(0),
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  try {
    await commands[command.do](command);
    report({ report: "done", number: command.number });
  } catch (error) {
    report({
      report: "failed", number: command.number, status: error.status ?? 0, message: String(error),
    });
  }
}
process.exit(0);
