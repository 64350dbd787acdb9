// Pictures of a run through time.
const data = JSON.parse(document.getElementById("data").textContent);

for (const figure of document.querySelectorAll(".film")) {
  const slider = figure.querySelector("input");
  if (!slider) continue;
  const run = Number(figure.dataset.run), frames = data.frames[run], name = data.runs[run].name;
  if (!frames.length) {
    figure.remove();
    continue;
  }
  const picture = figure.querySelector("img"), told = figure.querySelector("output");
  const button = figure.querySelector("button");
  let timer = null;

  function show(place) {
    const frame = frames[place], step = frame.step.toLocaleString("en");
    slider.value = place;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    picture.src = frame.picture;
    picture.alt = `What ${name} makes of a few images at step ${step}`;
    told.textContent = step;
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    let place = Number(slider.value) === frames.length - 1 ? 0 : Number(slider.value);
    show(place);
    button.textContent = "Stop";
    timer = setInterval(() => {
      if (++place < frames.length) show(place);
      if (place >= frames.length - 1) stop();
    }, 500);
  });
  show(frames.length - 1);
}
