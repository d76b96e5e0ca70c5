"use strict";
// Search and sort the table of patients, and draw the survival curve of the one that is chosen.
{
  const table = document.getElementById("table");
  const order = new Intl.Collator(undefined, { numeric: true }).compare;

  const draw = (curves, place, name) => {
    const svg = (tag, attributes, text) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    const [left, right, top, bottom] = [46, 448, 26, 226];
    const end = curves.times.at(-1);
    const x = (time) => left + (right - left) * time / end;
    const y = (share) => bottom - (bottom - top) * share / 1000;
    const path = (values) => `M${x(0)} ${y(1000)}`
      + values.map((value, i) => `L${x(curves.times[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const chart = svg("svg", { viewBox: "0 0 460 268", class: "curve", role: "img", "aria-label": `Survival curve of ${name}` });
    chart.append(svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }));
    for (const share of [0, 250, 500, 750, 1000]) {
      chart.append(svg("path", { class: "axis", d: `M${left - 4} ${y(share)}h4` }));
      chart.append(svg("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, (share / 1000).toString()));
    }
    const power = 10 ** Math.floor(Math.log10(end / 2));
    const step = [5, 2, 1].map((size) => size * power).find((size) => end / size >= 2);
    for (let i = 0; i * step <= end * 1.0001; i += 1) {
      chart.append(svg("path", { class: "axis", d: `M${x(i * step)} ${bottom}v4` }));
      chart.append(svg("text", { x: x(i * step), y: bottom + 18, "text-anchor": "middle" }, +(i * step).toPrecision(6)));
    }
    chart.append(svg("text", { x: left - 40, y: 13, class: "muted" }, "predicted share without the event"));
    chart.append(svg("text", { x: (left + right) / 2, y: 262, "text-anchor": "middle", class: "muted" }, `time in ${curves.unit}`));
    chart.append(svg("path", { class: "mean", d: path(curves.mean) }));
    chart.append(svg("path", { class: "patient", d: path(curves.curves[place]) }));
    const labels = [["patient", "this patient", ""], ["mean", `mean of all, n = ${curves.curves.length}`, ""]];
    labels.forEach(([kind, text], i) => {
      const height = bottom - 30 + 18 * i;
      chart.append(svg("path", { class: kind, d: `M${left + 12} ${height}h26` }));
      chart.append(svg("text", { x: left + 44, y: height + 4 }, text));
    });
    return chart;
  };

  if (table) {
    const body = table.tBodies[0];
    const controls = document.getElementById("controls");
    const shown = document.getElementById("shown");
    const search = controls.elements.search;
    const rows = [...body.rows].map((row, place) => ({ row, place, text: row.textContent.toLowerCase() }));
    const heads = [...table.tHead.rows[0].cells];

    const show = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const { row, text } of rows) {
        const fits = words.every((word) => text.includes(word));
        row.hidden = !fits;
        count += fits;
      }
      shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} patients`;
    };
    const sort = (column) => {
      const ascending = heads[column].getAttribute("aria-sort") !== "ascending";
      for (const head of heads) head.removeAttribute("aria-sort");
      heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const numeric = heads[column].classList.contains("n");
      const value = ({ row }) => row.cells[column].textContent;
      const number = (one) => parseFloat(value(one).replace(/,/g, ""));
      const levels = ["low", "middle", "high"];
      const compare = (a, b) => {
        const [x, y] = [a, b].map((one) => levels.indexOf(value(one)));
        if (x >= 0 && y >= 0) return x - y;
        return (numeric && number(a) - number(b)) || order(value(a), value(b));
      };
      rows.sort((a, b) => (ascending ? 1 : -1) * compare(a, b) || a.place - b.place);
      body.append(...rows.map(({ row }) => row));
    };
    const button = (cell, action) => {
      const element = document.createElement("button");
      element.type = "button";
      element.append(...cell.childNodes);
      element.addEventListener("click", action);
      cell.append(element);
    };

    heads.forEach((head, column) => button(head, () => sort(column)));
    const data = document.getElementById("curves");
    if (data) {
      const curves = JSON.parse(data.textContent);
      const panel = document.getElementById("patient");
      for (const { row, place } of rows) {
        button(row.cells[0], () => {
          for (const other of rows) other.row.removeAttribute("aria-selected");
          row.setAttribute("aria-selected", "true");
          const title = document.createElement("h3");
          const name = document.createElement("bdi");
          name.textContent = row.cells[0].textContent;
          title.append(name);
          const facts = document.createElement("p");
          facts.className = "muted";
          facts.textContent = heads.slice(1)
            .map((head, i) => `${head.textContent}: ${row.cells[i + 1].textContent}`).join(" · ");
          panel.replaceChildren(title, facts, draw(curves, place, name.textContent));
          panel.hidden = false;
          panel.scrollIntoView({ block: "nearest" });
        });
      }
      for (const hint of document.querySelectorAll(".scripted")) hint.classList.remove("scripted");
    }
    controls.hidden = false;
    controls.addEventListener("input", show);
    controls.addEventListener("submit", (event) => event.preventDefault());
    show();
  }
}
