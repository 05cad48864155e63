// A plain EventSource that asks for positions: what a page without the SDK would write.
// Prints one JSON line per event. Arguments: base URL, topics as JSON.
import { EventSource } from "eventsource";

const [url, topics] = [process.argv[2], JSON.parse(process.argv[3])];
const report = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const source = new EventSource(url + "/api/realtime?lastEventId=");

source.addEventListener("PB_CONNECT", async (e) => {
  report({ report: "connect", id: e.lastEventId });
  try {
    await fetch(url + "/api/realtime", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ clientId: e.lastEventId, subscriptions: topics }),
    });
    report({ report: "subscribed" });
  } catch {
    report({ report: "call_failed" });
  }
});
source.addEventListener("PB_RESYNC", (e) => report({ report: "resync", data: e.data }));
source.addEventListener("error", () => report({ report: "break", id: source.readyState }));
for (const topic of topics) {
  source.addEventListener(topic, (e) => {
    const { action, record } = JSON.parse(e.data);
    report({ report: "event", as: topic, action, record, id: e.lastEventId });
  });
}
process.stdin.on("end", () => process.exit(0)).resume();
