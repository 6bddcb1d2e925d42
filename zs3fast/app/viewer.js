// The viewer: a photo under one layer of colours for each model. The threshold, the blend, hidden classes and the
// pointer are looked after here, without the server. Names come as data and become text nodes, never HTML.
const UNLABELLED = 65535, STEPS = 200;
const state = { threshold: 0, blend: 0.6, hidden: new Set(), focus: null };
let shown = null, generation = 0;

function make(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load(text) {
  const mine = ++generation;
  const content = text ? JSON.parse(text) : null;
  if (content) {
    const pixels = content.height * content.width;
    for (const model of content.models) {
      const bytes = await unpack(model.map);
      model.labels = new Uint16Array(pixels);
      for (let i = 0; i < pixels; i++) model.labels[i] = bytes[2 * i] | (bytes[2 * i + 1] << 8);
      model.scores = bytes.subarray(2 * pixels);
    }
    content.rgb = content.colours.map((c) => [1, 3, 5].map((at) => parseInt(c.slice(at, at + 2), 16)));
  }
  if (mine !== generation) return; // a later result has come meanwhile
  shown = content;
  state.focus = null;
  build();
}

function build() {
  const root = element.querySelector(".zs3-viewer");
  root.querySelector(".zs3-empty").style.display = shown ? "none" : "";
  const stages = root.querySelector(".zs3-stages"), legend = root.querySelector(".zs3-legend");
  stages.replaceChildren();
  legend.replaceChildren();
  root.dataset.generation = generation;
  if (!shown) return;
  for (const model of shown.models) stages.append(stage(model));
  chips(legend);
  paint();
}

function stage(model) {
  const figure = make("figure", "zs3-view"), caption = make("figcaption", "");
  caption.append(make("span", "zs3-title", model.title));
  const box = make("div", "zs3-stage"), photo = document.createElement("img"), canvas = document.createElement("canvas");
  box.style.maxWidth = `calc(72vh * ${shown.width / shown.height})`;
  photo.src = shown.image;
  photo.alt = "the image";
  canvas.width = shown.width;
  canvas.height = shown.height;
  const tip = make("div", "zs3-tip");
  box.append(photo, canvas, tip);
  box.addEventListener("pointermove", (event) => {
    const area = box.getBoundingClientRect();
    point((event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
  });
  box.addEventListener("pointerleave", () => point(null));
  figure.append(caption, box);
  Object.assign(model, { canvas, tip });
  return figure;
}

function chips(legend) {
  const share = (index) => Math.max(...shown.models.map((model) => model.shares[index]));
  const order = shown.names.map((_, index) => index).filter((index) => share(index) > 0);
  order.sort((a, b) => share(b) - share(a));
  for (const index of order) {
    const name = shown.names[index], chip = make("button", "zs3-chip");
    chip.type = "button";
    chip.title = name;
    const swatch = make("span", "zs3-swatch");
    swatch.style.background = shown.colours[index];
    const shares = shown.models.map((model) => `${model.shares[index].toFixed(model.shares[index] < 9.95 ? 1 : 0)} %`);
    chip.append(swatch, make("span", "zs3-name", name), make("span", "zs3-share", shares.join(" | ")));
    chip.setAttribute("aria-pressed", String(!state.hidden.has(name)));
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(name)) state.hidden.add(name);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(name)));
      paint();
    });
    for (const [event, focus] of [["pointerenter", index], ["pointerleave", null]])
      chip.addEventListener(event, () => { state.focus = focus; paint(); });
    legend.append(chip);
  }
  const rest = shown.names.length - order.length;
  if (rest) legend.append(make("span", "zs3-rest", `${rest} more without a pixel`));
}

function label(model, at) {
  // the class of a pixel as it is shown, or null
  const index = model.labels[at];
  if (index === UNLABELLED || state.hidden.has(shown.names[index])) return null;
  return model.scores[at] < Math.round(state.threshold * STEPS) ? null : index;
}

function paint() {
  if (!shown) return;
  for (const model of shown.models) {
    const context = model.canvas.getContext("2d"), layer = context.createImageData(shown.width, shown.height);
    const off = shown.names.map((name) => state.hidden.has(name)), least = Math.round(state.threshold * STEPS);
    for (let at = 0; at < model.labels.length; at++) {
      const index = model.labels[at];
      if (index === UNLABELLED || off[index] || model.scores[at] < least) continue;
      const colour = shown.rgb[index];
      layer.data[4 * at] = colour[0];
      layer.data[4 * at + 1] = colour[1];
      layer.data[4 * at + 2] = colour[2];
      layer.data[4 * at + 3] = state.focus === null || state.focus === index ? 255 : 60;
    }
    context.putImageData(layer, 0, 0);
    model.canvas.style.opacity = state.blend;
  }
}

function point(x, y) {
  if (!shown) return;
  for (const model of shown.models) {
    const tip = model.tip;
    if (x === null) { tip.style.display = "none"; continue; }
    const column = Math.min(shown.width - 1, Math.max(0, Math.floor(x * shown.width)));
    const row = Math.min(shown.height - 1, Math.max(0, Math.floor(y * shown.height)));
    const at = row * shown.width + column, index = label(model, at);
    const swatch = make("span", "zs3-swatch");
    swatch.style.background = index === null ? "none" : shown.colours[index];
    const score = (model.scores[at] / STEPS).toFixed(2);
    tip.replaceChildren(swatch, make("span", "zs3-name", index === null ? "unlabelled" : shown.names[index]),
      make("span", "zs3-score", score));
    tip.style.display = "flex";
    tip.style.left = `${100 * x}%`;
    tip.style.top = `${100 * y}%`;
    tip.style.transform = `translate(${x > 0.6 ? "calc(-100% - 12px)" : "12px"}, ${y > 0.8 ? "calc(-100% - 12px)" : "12px"})`;
  }
}

window.zs3fast = {
  look(threshold, blend) { state.threshold = threshold; state.blend = blend; paint(); },
  hidden() { return JSON.stringify([...state.hidden]); },
};
watch("value", () => load(props.value));
load(props.value);
