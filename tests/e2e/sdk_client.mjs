// The official SDK under Node: one JSON command per line on standard input, one JSON report per
// line on standard output. Arguments: base URL, name of the EventSource library.
import readline from "node:readline";
import PocketBase from "pocketbase";
import { obeying } from "./sdk_commands.mjs";

const library = await import(process.argv[3]);
// Version 2 is CommonJS and exports the class itself.
globalThis.EventSource = library.EventSource ?? library.default;

const report = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const obey = obeying(new PocketBase(process.argv[2]), report);
for await (const line of readline.createInterface({ input: process.stdin })) {
  // Not awaited: a command may be given while another is still under way.
  obey(JSON.parse(line));
}
process.exit(0);
