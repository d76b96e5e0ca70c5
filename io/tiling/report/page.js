"use strict";
// Search, filter and sort the slides. The choices are kept in the address, after the "#", so that
// a link shows the same slides.
{
  const list = document.getElementById("slides");
  const controls = document.getElementById("controls");
  const shown = document.getElementById("shown");
  const order = new Intl.Collator(undefined, { numeric: true }).compare;
  const slides = [...list.children].map((card, place) => ({
    card, place, data: card.dataset,
    name: card.querySelector("h3").textContent,
    text: card.textContent.toLowerCase(),
  }));
  const states = ["failed", "incomplete", "empty", "ok"];
  const fields = ["search", "state", "flag", "reader", "sort"];
  const value = (name) => controls.elements[name].value;

  // A slide without the number comes last in both directions.
  const by = (number, direction) => (a, b) => {
    const [x, y] = [a, b].map((slide) => slide.data[number]);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return direction * (x - y);
  };
  const sorts = {
    state: (a, b) => states.indexOf(a.data.state) - states.indexOf(b.data.state),
    name: (a, b) => order(a.name, b.name),
    most: by("kept", -1), fewest: by("kept", 1), tissue: by("tissue", 1), flagged: by("flagged", -1),
    finest: by("mpp", 1), coarsest: by("mpp", -1),
  };

  const show = () => {
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const [state, flag, reader] = ["state", "flag", "reader"].map(value);
    let count = 0;
    for (const { card, data, text } of slides) {
      const fits = words.every((word) => text.includes(word))
        && (!state || data.state === state)
        && (!flag || data.flags.split(" ").includes(flag))
        && (!reader || data.reader === reader);
      card.hidden = !fits;
      count += fits;
    }
    slides.sort((a, b) => sorts[value("sort")](a, b) || a.place - b.place);
    list.append(...slides.map((slide) => slide.card));
    shown.textContent = `${count.toLocaleString("en")} of ${slides.length.toLocaleString("en")} slides`;
  };
  const read = () => {
    const hash = location.hash.slice(1);
    if (hash && document.getElementById(hash)) return show(); // a link within the page
    const choices = new URLSearchParams(hash);
    for (const name of fields) {
      const field = controls.elements[name];
      field.value = choices.get(name) ?? "";
      if (field.selectedIndex === -1 || !field.value) field.value = field.dataset.first ?? "";
    }
    show();
  };
  const keep = () => {
    const choices = new URLSearchParams();
    for (const name of fields) {
      if (value(name) !== (controls.elements[name].dataset.first ?? "")) choices.set(name, value(name));
    }
    const hash = choices.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    show();
  };

  controls.hidden = false;
  controls.addEventListener("input", keep);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", () => setTimeout(keep));
  addEventListener("hashchange", read);
  read();
}
