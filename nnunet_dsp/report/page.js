"use strict";
(() => {
  const PAGE = 60;
  const byId = (id) => document.getElementById(id);
  const cards = [...byId("cards").children];
  const rows = [...byId("rows").children];
  const inputs = ["find", "by-class", "by-kind", "by-status", "by-worst"].map(byId);
  const only = document.head.appendChild(document.createElement("style"));
  let limit = PAGE;

  const matches = (item, [text, label, kind, status, worst]) => {
    const data = item.dataset;
    return data.name.toLowerCase().includes(text.trim().toLowerCase())
      && (!label || data.classes.split(" ").includes(label))
      && (!kind || data.kinds.split(" ").includes(kind))
      && (!status || data.status === status)
      && (!worst || data.worst === "error" || data.worst === worst);
  };

  const apply = () => {
    const wanted = inputs.map((input) => input.value);
    let found = 0;
    cards.forEach((card, index) => {
      const good = matches(card, wanted);
      card.hidden = !good || found >= limit;
      rows[index].hidden = !good;
      found += good;
    });
    const shown = Math.min(found, limit);
    byId("shown").textContent = `${shown} of ${found} matching cases shown, ${cards.length} in all`;
    byId("pager").hidden = found <= limit;
    const label = wanted[1];
    only.textContent = label ? `.card .k:not(.c${label}){display:none}` : "";
  };

  inputs.forEach((input) => input.addEventListener("input", () => { limit = PAGE; apply(); }));
  byId("more").addEventListener("click", () => { limit += PAGE; apply(); });
  byId("all").addEventListener("click", () => { limit = Infinity; apply(); });
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll("[data-layer]").forEach((box) => {
    const set = () => document.body.classList.toggle(`no-${box.dataset.layer}`, !box.checked);
    box.addEventListener("change", set);
    set();
  });
  byId("tools").hidden = false;
  apply();

  // One picture at a time, large; arrow keys go on to the next one that can be seen.
  const viewer = byId("viewer");
  let current = null;
  const show = (button) => {
    current = button;
    const stack = button.querySelector(".stack").cloneNode(true);
    const [width, height] = stack.style.aspectRatio.split("/").map(Number);
    stack.style.width = `min(100%, ${(74 * width / height).toFixed(1)}vh)`;
    viewer.querySelector(".view").replaceChildren(stack);
    const article = button.closest(".found article");
    const text = article ? article.querySelector("p").textContent : stack.querySelector(".base").alt;
    viewer.querySelector(".caption").textContent = text;
    if (!viewer.open) viewer.showModal();
  };
  const step = (by) => {
    const all = [...document.querySelectorAll("main .zoom")].filter((button) => button.offsetParent);
    const next = all[all.indexOf(current) + by];
    if (next) show(next);
  };
  document.querySelectorAll("main .zoom").forEach((button) => button.addEventListener("click", () => show(button)));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("close", () => { if (current) current.focus({ preventScroll: true }); });
})();
