// Reads a JSON list of texts and writes what markdown.js makes of each, as HTML, without a browser.
// Usage: node render.mjs FOLDER < texts, where FOLDER has the page's modules and a package.json that says so.

class Text {
  constructor(text) {
    this.textContent = String(text);
  }

  get html() {
    return this.textContent.replace(/[&<>]/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[mark]);
  }
}

class Element {
  constructor(tag) {
    this.tag = tag;
    this.tagName = tag.toUpperCase();
    this.childNodes = [];
    this.attributes = {};
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  addEventListener() {}

  append(...children) {
    this.childNodes.push(...children.map((child) => (child instanceof Element || child instanceof Text ? child : new Text(child))));
  }

  get textContent() {
    return this.childNodes.map((child) => child.textContent).join("");
  }

  get html() {
    // Whatever the module set: a property that is an address or a number of a list, or an attribute.
    const shown = { ...this.attributes };
    for (const name of ["href", "rel", "start", "className"]) if (this[name] !== undefined) shown[name] = this[name];
    const given = Object.entries(shown).map(([name, value]) => ` ${name}="${value}"`).join("");
    const inner = this.childNodes.map((child) => child.html).join("");
    return ["br", "hr"].includes(this.tag) ? `<${this.tag}>` : `<${this.tag}${given}>${inner}</${this.tag}>`;
  }
}

class Anchor extends Element {}

globalThis.HTMLAnchorElement = Anchor;
globalThis.document = { createElement: (tag) => (tag === "a" ? new Anchor(tag) : new Element(tag)) };
// No clipboard, so no button to copy.
Object.defineProperty(globalThis, "navigator", { value: {}, configurable: true });

const { readBlock } = await import(`file://${process.argv[2]}/markdown.js`);

function render(text) {
  const lines = text.split(/\r?\n/);
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const { node, next } = readBlock(lines, at, 0);
    if (node) blocks.push(node.html);
    at = next;
  }
  return blocks.join("");
}

let input = "";
for await (const piece of process.stdin) input += piece;
process.stdout.write(JSON.stringify(JSON.parse(input).map((text) => render(text))));
