"use strict";
// Puts the charts into their places, in the colors of the page, and shows the image of a point that is picked.
(() => {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = [];

  function paint(doc) {
    const [faint, rule, grid] = ["--faint", "--rule", "--grid"].map(color);
    for (const model of doc.all_models) {
      if (model.type.endsWith("Axis")) {
        model.setv({axis_label_text_color: faint, major_label_text_color: faint, axis_line_color: rule,
          major_tick_line_color: rule});
      } else if (model.type === "Grid") {
        model.setv({grid_line_color: grid});
      }
    }
  }

  function pick(holder, source, point) {
    const data = source.data;
    const image = holder.querySelector("img");
    const same = [];
    data.group.forEach((group, other) => {
      if (other === point || (group !== "" && group === data.group[point])) same.push(other);
    });
    holder.dataset.point = point;
    holder.querySelector(".none").hidden = true;
    image.hidden = false;
    image.src = data.picture[point];
    image.alt = `${data.name[point]}, ${data.note[point]}`;
    holder.querySelector("figcaption").textContent = `${data.name[point]}: ${data.note[point]}`;
    source.selected.indices = same;
  }

  function follow(section, doc) {
    const holder = section.querySelector(".picked");
    const source = doc.get_model_by_name("points");
    const count = source.data.x.length;
    let picking = false;
    const show = (point) => {
      picking = true;
      pick(holder, source, point);
      picking = false;
    };
    source.selected.change.connect(() => {
      const [point] = source.selected.indices;
      if (!picking && point !== undefined) show(point);
    });
    for (const button of section.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const before = holder.dataset.point === undefined ? (button.dataset.step > 0 ? -1 : 0) : +holder.dataset.point;
        show((before + +button.dataset.step + count) % count);
      });
    }
  }

  async function draw() {
    for (const place of document.querySelectorAll(".plot")) {
      const item = JSON.parse(document.getElementById(place.dataset.item).textContent);
      const views = await Bokeh.embed.embed_item(item, place.id);
      const view = Array.isArray(views) ? views[0] : [...views][0];
      const doc = view.model.document;
      paint(doc);
      drawn.push(doc);
      const section = place.closest(".map");
      if (section) follow(section, doc);
    }
    document.documentElement.dataset.drawn = "yes";
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(paint));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", draw);
  else draw();
})();
