// Attention and similarity of single patches, and the steps of a masked autoencoder.
const { panel, viridis, inferno } = JSON.parse(document.getElementById("data").textContent);

function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return bytes;
}

function option(select, value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  select.append(made);
}

function lookInside() {
  const [rows, columns] = panel.grid, count = rows * columns;
  const byId = (name) => document.getElementById(`panel-${name}`);
  const image = byId("image"), map = byId("map"), layer = byId("layer"), head = byId("head");
  const source = byId("source"), target = byId("target"), told = byId("told");
  // Whole pixels for each patch, so that the grid falls between them.
  const side = Math.max(1, Math.floor(512 / Math.max(rows, columns)));
  for (const canvas of [source, target]) [canvas.width, canvas.height] = [columns * side, rows * side];
  const pictures = panel.images.map((item) => {
    const made = new Image();
    made.src = item.picture;
    return made;
  });
  const maps = panel.images.map((item) => ({
    similarity: unpack(item.similarity),
    attention: item.attention ? unpack(item.attention) : null,
  }));
  let patch = Math.floor(rows / 2) * columns + Math.floor(columns / 2);

  panel.images.forEach((item, place) => option(image, place, item.name));
  if (panel.layers.length) option(map, "attention", "attention of the patch");
  if (panel.layers.length && panel.has_cls) option(map, "cls", "attention of the class token");
  option(map, "similarity", "similarity to the patch");
  for (const number of panel.layers) option(layer, number, `${number + 1}`);
  layer.value = panel.layers.at(-1);
  option(head, "mean", "mean");
  for (let number = 0; number < panel.heads; number++) option(head, number, `${number + 1}`);

  function values() {
    const own = maps[Number(image.value)];
    if (map.value === "similarity") {
      return Float32Array.from(own.similarity.subarray(patch * count, (patch + 1) * count), (byte) => byte / 255);
    }
    const queries = count + (panel.has_cls ? 1 : 0), heads = Math.max(panel.heads, 1);
    const query = map.value === "cls" ? 0 : patch + (panel.has_cls ? 1 : 0);
    const block = panel.layers.indexOf(Number(layer.value));
    const chosen = head.value === "mean" ? [...Array(heads).keys()] : [Number(head.value)];
    const found = new Float32Array(count);
    for (const number of chosen) {
      const start = ((block * heads + number) * queries + query) * count;
      for (let place = 0; place < count; place++) found[place] += own.attention[start + place] / 255;
    }
    const most = found.reduce((best, value) => Math.max(best, value), 1e-9);
    return found.map((value) => value / most);
  }

  function paint() {
    const found = values(), colours = map.value === "similarity" ? viridis : inferno;
    const brush = source.getContext("2d"), page = target.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(pictures[Number(image.value)], 0, 0, source.width, source.height);
    if (map.value !== "cls") {
      const left = patch % columns * side, top = Math.floor(patch / columns) * side;
      for (const [colour, inset, thick] of [["#fff", -1.5, 5], ["#d81b1b", -0.5, 2.5]]) {
        brush.strokeStyle = colour;
        brush.lineWidth = thick;
        brush.strokeRect(left + inset, top + inset, side - 2 * inset, side - 2 * inset);
      }
    }
    let best = 0;
    for (let place = 0; place < count; place++) {
      const looks = map.value !== "similarity" || place !== patch;
      if (looks && (found[place] > found[best] || (map.value === "similarity" && best === patch))) best = place;
      const colour = colours[Math.min(63, Math.floor(found[place] * 64))];
      page.fillStyle = `#${colour.toString(16).padStart(6, "0")}`;
      page.fillRect(place % columns * side, Math.floor(place / columns) * side, side, side);
    }
    const scale = byId("scale").getContext("2d");
    colours.forEach((colour, place) => {
      scale.fillStyle = `#${colour.toString(16).padStart(6, "0")}`;
      scale.fillRect(place, 0, 1, 1);
    });
    const similar = map.value === "similarity";
    layer.disabled = head.disabled = similar;
    byId("low").textContent = similar ? "0 or less" : "none";
    byId("high").textContent = similar ? "1" : "most";
    byId("what").textContent = similar ? "Cosine similarity of the last block's tokens" : "Attention, brightest at its largest";
    const where = (place) => `row ${Math.floor(place / columns) + 1}, column ${place % columns + 1}`;
    const who = map.value === "cls" ? "The class token" : `The patch in ${where(patch)}`;
    const which = `block ${Number(layer.value) + 1}, ${head.value === "mean" ? "mean of the heads" : `head ${Number(head.value) + 1}`}`;
    told.textContent = similar
      ? `${who} is most like the one in ${where(best)}: ${found[best].toFixed(2)}.`
      : `${who} looks most at ${where(best)} (${which}).`;
  }

  function choose(event) {
    const box = source.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * columns);
    const row = Math.floor((event.clientY - box.top) / box.height * rows);
    if (row < 0 || row >= rows || column < 0 || column >= columns || patch === row * columns + column) return;
    patch = row * columns + column;
    paint();
  }
  source.addEventListener("pointermove", choose);
  source.addEventListener("pointerdown", choose);
  source.addEventListener("keydown", (event) => {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const moves = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, columns - 1],
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    patch = Math.min(Math.max(move[0], 0), rows - 1) * columns + Math.min(Math.max(move[1], 0), columns - 1);
    paint();
  });
  for (const select of [image, map, layer, head]) select.addEventListener("change", paint);
  if (panel.heads === 0) head.parentElement.hidden = true;
  if (!panel.layers.length) layer.parentElement.hidden = true;
  Promise.all(pictures.map((picture) => picture.decode())).then(paint);
  return image;
}

function stepThrough(image) {
  const about = panel.steps, [rows, columns] = panel.grid;
  const picture = document.getElementById("mae-picture"), grid = document.getElementById("mae-grid");
  const text = document.getElementById("mae-text"), number = document.getElementById("mae-number");
  const back = document.getElementById("mae-back"), next = document.getElementById("mae-next");
  const removed = about.num_patches - about.num_kept;
  const units = about.norm_pix_loss
    ? " Each is predicted normalised by itself; its mean and contrast are taken from the original here." : "";
  const steps = [
    ["picture", "Patchify", `The picture is cut into ${rows} x ${columns} = ${about.num_patches} patches of ${about.pixels} numbers.`],
    ["masked", "Mask", `${removed} of them, drawn at random, are removed. Nothing of them enters the encoder.`],
    ["tokens", "Encode", `${about.depth} blocks turn the ${about.num_kept} that stay into tokens of ${about.embed_dim} numbers, shown here by their three main components as colours.`],
    ["decoded", "Decode", `A mask token is put in each gap, and ${about.decoder_depth} blocks of width ${about.decoder_embed_dim} predict the pixels of every patch.${units}`],
    ["pasted", "Compare", "The visible patches are laid over the prediction. The loss is the squared error on the removed ones alone."],
  ];
  let place = 0;
  const line = "rgba(127,127,127,.8)";
  grid.style.backgroundImage =
    `linear-gradient(to right, ${line} 1px, transparent 1px), linear-gradient(to bottom, ${line} 1px, transparent 1px)`;
  grid.style.backgroundSize = `${100 / columns}% ${100 / rows}%`;

  function show() {
    const [key, title, words] = steps[place], item = panel.images[Number(image.value)];
    picture.src = item[key];
    picture.alt = `${title}: ${item.name}`;
    text.textContent = `${title}. ${words}`;
    number.textContent = `${place + 1} of ${steps.length}: ${title}`;
    grid.style.display = place === 0 ? "block" : "none";
    back.disabled = place === 0;
    next.disabled = place === steps.length - 1;
  }
  back.addEventListener("click", () => { place--; show(); });
  next.addEventListener("click", () => { place++; show(); });
  image.addEventListener("change", show);
  show();
}

if (panel) {
  const image = lookInside();
  if (panel.steps) stepThrough(image);
}
