// The plain EventSource under Node. Prints one JSON line per report.
// Arguments: base URL, topics as JSON.
import { EventSource } from "eventsource";
import { listen } from "./native_listener.mjs";

const report = (what) => process.stdout.write(JSON.stringify(what) + "\n");
listen(EventSource, process.argv[2], JSON.parse(process.argv[3]), report);
process.stdin.on("end", () => process.exit(0)).resume();
