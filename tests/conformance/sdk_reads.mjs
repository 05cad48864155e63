// Replays calls of the records corpus with the official SDK under Node. Standard input: one JSON
// array of calls; standard output: one JSON array of what each sent and returned.
import { text } from "node:stream/consumers";
import PocketBase from "pocketbase";

const url = process.argv[2];

function filled(value, filter) {
  if (value === "{{filter}}") return filter;
  if (Array.isArray(value)) return value.map((item) => filled(item, filter));
  if (value && typeof value === "object") {
    if ("$date" in value) return new Date(value.$date);
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, filled(v, filter)]));
  }
  return value;
}

async function replay({ token, collection, method, args, filter }) {
  const pb = new PocketBase(url);
  pb.autoCancellation(false);
  if (token) pb.authStore.save(token, null);
  const requests = [];
  // Not beforeSend, which gets the URL without its query.
  pb.beforeSend = (to, options) => {
    const fetching = (all, init) => {
      requests.push(`${init.method} ${String(all).slice(url.length)}`);
      return fetch(all, init);
    };
    return { url: to, options: { ...options, fetch: fetching } };
  };
  const made = filter && pb.filter(filter[0], filled(filter[1]));
  try {
    return { requests, value: await pb.collection(collection)[method](...filled(args, made)) };
  } catch (error) {
    return { requests, error: { status: error.status, response: error.response } };
  }
}

const results = [];
for (const call of JSON.parse(await text(process.stdin))) results.push(await replay(call));
process.stdout.write(JSON.stringify(results));
