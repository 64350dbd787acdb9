// What can be tried on the page "How a ViT sees". data.js, made by make.py, holds what models computed.
(() => {
  const data = window.howAViTSees;
  const byId = (name) => document.getElementById(`hv-${name}`);
  if (!data || !byId("patchify")) return;
  const SIDE = 480; // pixels of a canvas
  const FRAMES = [["#ffffff", 7], ["#d81b1b", 3]]; // red within white is seen on any ground
  const css = (colour) => `#${colour.toString(16).padStart(6, "0")}`;
  const number = (value) => value.toLocaleString("en");
  const where = (place, rows) => `row ${Math.floor(place / rows) + 1}, column ${place % rows + 1}`;
  const cosine = (byte) => byte / 255 * 2 - 1;

  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(plain).arrayBuffer());
  }

  async function load(address) {
    const made = new Image();
    made.src = address;
    await made.decode();
    return made;
  }

  // A patch is shown while it is pointed at, and stays when it is clicked, tapped or reached by the arrow keys.
  function choosable(canvas, rowsOf, begin, show) {
    let kept = begin;
    const at = (event) => {
      const box = canvas.getBoundingClientRect(), rows = rowsOf();
      const inside = (place, length) => Math.min(Math.max(Math.floor(place / length * rows), 0), rows - 1);
      return inside(event.clientY - box.top, box.height) * rows + inside(event.clientX - box.left, box.width);
    };
    canvas.addEventListener("pointermove", (event) => show(at(event)));
    canvas.addEventListener("pointerdown", (event) => show(kept = at(event)));
    canvas.addEventListener("pointerleave", () => show(kept));
    canvas.addEventListener("keydown", (event) => {
      const rows = rowsOf(), [row, column] = [Math.floor(kept / rows), kept % rows];
      const moves = {
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column],
        ArrowDown: [row + 1, column], Home: [row, 0], End: [row, rows - 1],
      };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const [down, across] = move.map((place) => Math.min(Math.max(place, 0), rows - 1));
      show(kept = down * rows + across);
    });
    return (place) => show(kept = place); // another grid
  }

  function paintMap(canvas, rows, values, colours) {
    const brush = canvas.getContext("2d");
    values.forEach((value, place) => {
      const [top, left] = [Math.floor(place / rows), place % rows].map((line) => Math.round(line * canvas.width / rows));
      const size = Math.ceil(canvas.width / rows);
      brush.fillStyle = css(colours[Math.min(63, Math.max(0, Math.floor(value * 64)))]);
      brush.fillRect(left, top, size, size);
    });
  }

  function paintFrame(canvas, rows, place) {
    const brush = canvas.getContext("2d"), size = canvas.width / rows;
    for (const [colour, thick] of FRAMES) {
      brush.strokeStyle = colour;
      brush.lineWidth = thick * canvas.width / SIDE;
      brush.strokeRect(place % rows * size, Math.floor(place / rows) * size, size, size);
    }
  }

  function paintGrid(brush, rows, step) {
    brush.strokeStyle = "rgba(90, 90, 90, .55)";
    brush.lineWidth = 2; // one on the screen, where the canvas is shown at half its size
    brush.beginPath();
    for (let line = 0; line <= rows; line++) {
      const place = line * step;
      brush.moveTo(place, 0);
      brush.lineTo(place, rows * step);
      brush.moveTo(0, place);
      brush.lineTo(rows * step, place);
    }
    brush.stroke();
  }

  for (const canvas of document.querySelectorAll(".hv-scale")) {
    const brush = canvas.getContext("2d");
    data[canvas.dataset.map].forEach((colour, place) => {
      brush.fillStyle = css(colour);
      brush.fillRect(place, 0, 1, 1);
    });
  }

  // 1. Patches.
  function patchify(scene) {
    const side = byId("side"), patch = byId("patch"), canvas = byId("patchify"), brush = canvas.getContext("2d");
    const bytes = (count) => count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(1)} GB`;

    // As ssl_vit.data.transform.check_divisible; a test compares both.
    function refusal(length, step) {
      if (length >= step && length % step === 0) return null;
      const nearest = [...new Set([Math.max(Math.floor(length / step), 1) * step, (Math.floor(length / step) + 1) * step])];
      return `image_size=(${length}, ${length}): the height ${length} is no multiple of ${step}, the encoder's stride; ` +
        `the nearest that are: ${nearest.join(" and ")}`;
    }
    window.howAViTSees.refusal = refusal;

    function show() {
      const [length, step] = [Number(side.value), Number(patch.value)], rows = Math.floor(length / step);
      const scale = SIDE / length, whole = rows * step * scale, tokens = rows * rows, error = refusal(length, step);
      brush.imageSmoothingEnabled = true;
      brush.drawImage(scene, 0, 0, SIDE, SIDE);
      paintGrid(brush, rows, step * scale);
      if (error) {
        brush.fillStyle = "rgba(216, 27, 27, .45)";
        brush.fillRect(whole, 0, SIDE - whole, SIDE);
        brush.fillRect(0, whole, whole, SIDE - whole);
      }
      byId("side-value").textContent = `${length} px`;
      byId("patch-value").textContent = `${step} px`;
      const matrix = 6 * (tokens + 1) ** 2 * 4;
      const facts = {
        grid: `${rows} x ${rows}${error ? `, and ${length - rows * step} px left over` : ""}`,
        tokens: `${number(tokens)} patches + 1 class token`,
        numbers: `${step} x ${step} x 3 = ${number(step * step * 3)} numbers`,
        pairs: `${number(tokens + 1)} x ${number(tokens + 1)} = ${number((tokens + 1) ** 2)}`,
        one: bytes(matrix),
        all: bytes(matrix * 12 * 64),
      };
      for (const [name, text] of Object.entries(facts)) byId(`fact-${name}`).textContent = text;
      byId("refusal").textContent = error ?? "";
      byId("fits").textContent = error ? "Not divisible: the red strip belongs to no whole patch. The toolkit stops with:"
        : "Divisible: every pixel belongs to one patch.";
    }
    side.addEventListener("input", show);
    patch.addEventListener("input", show);
    for (const button of document.querySelectorAll("[data-hv-size]")) {
      button.addEventListener("click", () => {
        [side.value, patch.value] = button.dataset.hvSize.split(",");
        show();
      });
    }
    show();
  }

  // 2. Positions.
  function sincos(width, rows) { // ssl_vit.models.patches.sincos_positions; a test compares both
    const quarter = width / 4, table = [];
    for (let place = 0; place < rows * rows; place++) {
      const found = [];
      for (const axis of [place % rows, Math.floor(place / rows)]) {
        for (const wave of [Math.sin, Math.cos]) {
          for (let part = 0; part < quarter; part++) found.push(wave(axis * 10000 ** (-part / quarter)));
        }
      }
      table.push(found);
    }
    return table;
  }
  window.howAViTSees.sincos = sincos;

  async function positions() {
    const kind = byId("table"), canvas = byId("positions"), told = byId("positions-told");
    const kinds = {}, stored = data.positions;
    for (const name of ["dinov2", "untrained", "cut_off"]) {
      const bytes = await unpack(stored[name].cosines), count = stored[name].rows ** 2;
      kinds[name] = [stored[name].rows, (from, to) => cosine(bytes[from * count + to])];
    }
    const turned = await unpack(stored.rotary.offsets), across = 2 * stored.rotary.rows - 1;
    kinds.rotary = [stored.rotary.rows, (from, to) => {
      const [down, right] = [Math.floor(to / 12) - Math.floor(from / 12), to % 12 - from % 12];
      return cosine(turned[(down + 11) * across + right + 11]);
    }];
    const rows = stored.rotary.rows, table = sincos(384, rows);
    kinds.sincos = [rows, (from, to) => table[from].reduce((sum, value, part) => sum + value * table[to][part], 0) / 192];

    function show(place) {
      const [count, like] = kinds[kind.value], found = Array.from({ length: count ** 2 }, (_, other) => like(place, other));
      const [low, high] = [Math.min(...found), Math.max(...found)];
      paintMap(canvas, count, found.map((value) => (value - low) / (high - low)), data.viridis);
      paintFrame(canvas, count, place);
      byId("positions-low").textContent = low.toFixed(2);
      byId("positions-high").textContent = high.toFixed(2);
      const ranked = found.map((value, other) => [value, other]).filter(([, other]) => other !== place).sort((a, b) => b[0] - a[0]);
      told.textContent = `R${where(place, count).slice(1)}: most like ${where(ranked[0][1], count)} (${ranked[0][0].toFixed(2)}), ` +
        `least like ${where(ranked.at(-1)[1], count)} (${ranked.at(-1)[0].toFixed(2)}).`;
      for (const note of document.querySelectorAll("[data-hv-table]")) note.hidden = note.dataset.hvTable !== kind.value;
    }
    const middle = () => Math.floor(kinds[kind.value][0] / 3) * (kinds[kind.value][0] + 1);
    const go = choosable(canvas, () => kinds[kind.value][0], middle(), show);
    kind.addEventListener("change", () => go(middle()));
    go(middle());
  }

  function shuffle(scene) {
    const canvas = byId("shuffled"), brush = canvas.getContext("2d"), button = byId("shuffle"), rows = 12, step = SIDE / rows;
    const cell = scene.width / rows;
    function show(mixed) {
      data.shuffle.order.forEach((from, place) => {
        const source = mixed ? from : place;
        brush.drawImage(scene, source % rows * cell, Math.floor(source / rows) * cell, cell, cell,
          place % rows * step, Math.floor(place / rows) * step, step, step);
      });
      paintGrid(brush, rows, step);
      button.setAttribute("aria-pressed", mixed);
      canvas.setAttribute("aria-label", `Four emojis cut into 144 patches, ${mixed ? "in a random order" : "in their places"}`);
    }
    button.addEventListener("click", () => show(button.getAttribute("aria-pressed") !== "true"));
    show(false);
  }

  // 3. Attention and similarity; the layout of the numbers is that of the report's panel.
  async function explorer() {
    const model = byId("model"), picture = byId("picture"), block = byId("block"), heads = byId("heads");
    const source = byId("source"), mean = byId("mean"), similar = byId("similar"), told = byId("told");
    const rows = data.models[0].grid[0], count = rows ** 2, opened = new Map();
    let panel, item, chosen = 0;

    async function open(place, image) {
      const key = `${place} ${image}`, found = data.models[place].images[image];
      if (!opened.has(key)) {
        const [shown, attention, similarity] = await Promise.all([load(found.picture), unpack(found.attention), unpack(found.similarity)]);
        opened.set(key, { shown, attention, similarity });
      }
      return opened.get(key);
    }

    async function begin() {
      const wanted = [Number(model.value), Number(picture.value)];
      const found = await open(...wanted);
      if (wanted[0] !== Number(model.value) || wanted[1] !== Number(picture.value)) return; // another was chosen meanwhile
      item = found;
      if (panel !== data.models[wanted[0]]) {
        panel = data.models[wanted[0]];
        block.max = panel.layers.length - 1;
        block.value = block.max;
        heads.replaceChildren(...Array.from({ length: panel.heads }, (_, head) => {
          const figure = document.createElement("figure"), canvas = document.createElement("canvas"), text = document.createElement("figcaption");
          canvas.width = canvas.height = 120;
          canvas.setAttribute("role", "img");
          canvas.setAttribute("aria-label", `Attention of head ${head + 1}`);
          text.textContent = `head ${head + 1}`;
          figure.append(text, canvas);
          return figure;
        }));
      }
      show(chosen);
    }

    function show(place) {
      chosen = place;
      if (!item) return;
      const ofClass = byId("look-cls").checked, layer = Number(block.value), brush = source.getContext("2d");
      const query = ofClass ? 0 : place + 1, total = new Float32Array(count);
      [...heads.querySelectorAll("canvas")].forEach((canvas, head) => {
        const start = ((layer * panel.heads + head) * (count + 1) + query) * count;
        const values = Array.from(item.attention.subarray(start, start + count));
        const most = Math.max(...values, 1);
        values.forEach((value, other) => { total[other] += value; });
        paintMap(canvas, rows, values.map((value) => value / most), data.inferno);
        if (!ofClass) paintFrame(canvas, rows, place);
      });
      const most = Math.max(...total, 1), sum = total.reduce((before, value) => before + value, 0);
      paintMap(mean, rows, total.map((value) => value / most), data.inferno);
      const like = Array.from(item.similarity.subarray(place * count, (place + 1) * count), (byte) => byte / 255);
      paintMap(similar, rows, like, data.viridis);
      brush.imageSmoothingEnabled = false;
      brush.drawImage(item.shown, 0, 0, SIDE, SIDE);
      for (const canvas of [source, similar, ...ofClass ? [] : [mean]]) paintFrame(canvas, rows, place);
      const best = (values, self) => values.reduce((found, value, other) => other !== self && (found < 0 || value > values[found]) ? other : found, -1);
      const looked = best(total, ofClass ? -1 : place), nearest = best(like, place);
      const depth = panel.layers[layer] + 1;
      byId("block-value").textContent = `${depth} of ${panel.layers.at(-1) + 1}`;
      block.setAttribute("aria-valuetext", `block ${depth}`);
      const share = (other) => `${Math.round(100 * total[other] / sum)} %`;
      const itself = ofClass ? "" : ` It gives ${share(place)} to itself.`;
      told.textContent = `${ofClass ? "The class token" : `The patch in ${where(place, rows)}`} looks most at ${where(looked, rows)} ` +
        `in block ${depth}: ${share(looked)} of what it gives to patches.${itself} ` +
        `Most like the patch in ${where(place, rows)} is ${where(nearest, rows)}: cosine ${like[nearest].toFixed(2)}.`;
      registers(like, place);
    }

    // 4. Four register tokens counted as patches: every value lands four places later.
    function registers(like, place) {
      const canvas = byId("registers"), wrong = byId("counted").checked;
      paintMap(canvas, rows, like.map((_, other) => wrong ? like[other - 4] ?? 0 : like[other]), data.viridis);
      paintFrame(canvas, rows, place);
    }

    data.models.forEach((one, place) => model.append(new Option(one.name, place)));
    data.models[0].images.forEach((one, place) => picture.append(new Option(one.name, place)));
    for (const select of [model, picture]) select.addEventListener("change", begin);
    for (const input of [block, byId("look-patch"), byId("look-cls"), byId("counted")]) input.addEventListener("input", () => show(chosen));
    choosable(source, () => rows, chosen = 2 * rows + 3, show);
    await begin();
  }

  async function start() {
    const scene = await load(byId("scene").src);
    patchify(scene);
    shuffle(scene);
    await positions();
    await explorer();
    byId("patchify").dataset.ready = "true";
  }
  start();
})();
