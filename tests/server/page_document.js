// Runs the live page's script in Node.js with as much of a document as it uses, and prints the elements as HTML.
// Standard input: {page, states, locked, key}; a state of null is answered with status 500, `key` is what was entered.
"use strict";
const { page, states, locked, key } = JSON.parse(require("fs").readFileSync(0, "utf8"));

class Node {
  constructor(tag, attributes = {}) {
    Object.assign(this, { tag, attributes, children: [], listeners: {}, dataset: {}, value: "" });
    this.style = { setProperty: (name, value) => { this.style[name] = value; } };
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(kind, call) { this.listeners[kind] = call; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  contains() { return false; }
  get hidden() { return "hidden" in this.attributes; }
  set hidden(to) { if (to) this.attributes.hidden = ""; else delete this.attributes.hidden; }
  get className() { return this.attributes.class ?? ""; }
  set className(to) { this.attributes.class = to; }
  get textContent() { return this.children.map(child => child.textContent ?? child).join(""); }
  set textContent(to) { this.children = [to]; }
  get html() {
    const style = Object.entries(this.style).filter(([name]) => name !== "setProperty").map(([name, value]) => `${name}: ${value};`);
    const all = Object.entries({ ...this.attributes, ...(style.length && { style: style.join(" ") }) });
    const own = [...all, ...Object.entries(this.dataset).map(([name, value]) => [`data-${name}`, value])];
    const inside = this.children.map(child => child.html ?? escaped(child)).join("");
    return `<${this.tag}${own.map(([name, value]) => ` ${name}="${escaped(value)}"`).join("")}>${inside}</${this.tag}>`;
  }
}
const escaped = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");

const elements = new Map(), table = new Node("table"), body = new Node("body");
for (const [, tag, text] of page.matchAll(/<([a-z0-9]+)((?: [a-z-]+(?:="[^"]*")?)*)>/g)) {
  const attributes = Object.fromEntries([...text.matchAll(/ ([a-z-]+)(?:="([^"]*)")?/g)].map(([, name, value]) => [name, value ?? ""]));
  if (attributes.id) elements.set(attributes.id, new Node(tag === "input" ? "label" : tag, attributes));
}
let next = null, asked = 0;
const document = {
  body, hidden: false, addEventListener() {}, createElement: tag => new Node(tag), createElementNS: (_, tag) => new Node(tag),
  getElementById: id => elements.get(id), querySelector: () => table, querySelectorAll: () => [],
};
async function fetch() {
  const state = states[Math.min(asked++, states.length - 1)];
  return locked ? { ok: false, status: 401 } : { ok: state !== null, status: state ? 200 : 500, json: async () => state };
}
const script = page.match(/<script>([^]*)<\/script>/)[1];
new Function("document", "fetch", "sessionStorage", "getSelection", "location", "setTimeout", "clearTimeout", script)(
  document, fetch, { getItem: () => key, setItem() {} }, () => ({ isCollapsed: true }), { origin: "http://here" },
  call => { next = call; }, () => {});

(async () => {
  for (let polls = 0; polls < 3; polls++) {
    while (!next) await new Promise(setImmediate);
    const again = next;
    next = null;
    again();
  }
  while (!next) await new Promise(setImmediate);
  body.children = [...elements.values()];
  process.stdout.write(body.html);
})();
