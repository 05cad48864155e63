// What tests can ask the official SDK to do, under Node and in browsers alike: nothing but the
// SDK's own API. Each command is answered with a report `done` or `failed` of its number.
export function obeying(pb, report) {
  const endings = {};
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
    login: ({ collection, identity, password }) =>
      pb.collection(collection).authWithPassword(identity, password),
    refresh: ({ collection }) => pb.collection(collection).authRefresh(),
    subscribe: async ({ collection, topic, options, as }) => {
      endings[as ?? topic] = await pb.collection(collection).subscribe(
        topic,
        (e) => report({ report: "event", as: as ?? topic, action: e.action, record: e.record }),
        options,
      );
    },
    // The function that subscribe() returned: unsubscribeByTopicAndListener.
    leave: ({ as }) => endings[as](),
    unsubscribe: ({ collection, topic }) => pb.collection(collection).unsubscribe(topic),
    unsubscribe_topic: ({ topic }) => pb.realtime.unsubscribe(topic),
    unsubscribe_prefix: ({ prefix }) => pb.realtime.unsubscribeByPrefix(prefix),
    is_connected: () =>
      report({ report: "connected", is: pb.realtime.isConnected, id: pb.realtime.clientId }),
    disconnects: () => {
      pb.realtime.onDisconnect = (topics) => report({ report: "disconnect", topics });
    },
    connects: () =>
      pb.realtime.subscribe("PB_CONNECT", (e) => report({ report: "connect", ...e })),
    resume,
  };

  return async (command) => {
    try {
      await commands[command.do](command);
      report({ report: "done", number: command.number });
    } catch (error) {
      report({
        report: "failed", number: command.number, status: error.status ?? 0, message: String(error),
      });
    }
  };
}
