// What a page without the SDK would write: a plain EventSource that asks for positions.
// Runs under Node and in browsers; tells `report` of everything.
export function listen(EventSource, url, topics, report) {
  const source = new EventSource(url + "/api/realtime?lastEventId=");

  source.addEventListener("PB_CONNECT", async (e) => {
    report({ report: "connect", id: e.lastEventId });
    try {
      const answer = await fetch(url + "/api/realtime", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ clientId: e.lastEventId, subscriptions: topics }),
      });
      report({ report: answer.ok ? "subscribed" : "refused", status: answer.status });
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
  return source;
}
