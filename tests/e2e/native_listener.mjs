// What a page without the SDK would write: a plain EventSource that asks for positions, and takes a
// new one where the browser gives up: after a status other than 200, and Chromium also after a head
// that was cut short. Runs under Node and in browsers; tells `report` of everything.
export function listen(EventSource, url, topics, report) {
  let last = "";

  function open() {
    const source = new EventSource(url + "/api/realtime?lastEventId=" + last);
    source.addEventListener("error", () => {
      report({ report: "break", id: source.readyState });
      if (source.readyState === 2) setTimeout(open, 1000);
    });
    source.addEventListener("PB_CONNECT", (e) => {
      report({ report: "connect", id: e.lastEventId });
      subscribe(e.lastEventId);
    });
    source.addEventListener("PB_CURSOR", (e) => { last = e.lastEventId; });
    source.addEventListener("PB_RESYNC", (e) => {
      report({ report: "resync", data: e.data });
      last = e.lastEventId;
    });
    for (const topic of topics) {
      source.addEventListener(topic, (e) => {
        const { action, record } = JSON.parse(e.data);
        report({ report: "event", as: topic, action, record, id: e.lastEventId });
        last = e.lastEventId;
      });
    }
  }

  async function subscribe(clientId) {
    try {
      const answer = await fetch(url + "/api/realtime", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ clientId, subscriptions: topics }),
      });
      report({ report: answer.ok ? "subscribed" : "refused", status: answer.status });
    } catch {
      report({ report: "call_failed" });
    }
  }

  open();
}
