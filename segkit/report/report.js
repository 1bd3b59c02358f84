
/** Pictures that a gallery shows before it is asked for all of them. */
const FEW = 8;

/** The gallery: what a picture shows, which pictures there are, and in which order. */
const openGallery = (gallery) => {
  const cards = [...gallery.children];
  const ofClass = document.getElementById("of-class");
  const order = document.getElementById("order");
  const more = document.getElementById("more");
  let all = false;
  const ious = new Map(cards.map((card) => [card, new Map(card.dataset.iou.split(" ").map((one) => one.split(":")))]));

  const arrange = () => {
    const c = ofClass.value;
    const value = (card) => Number(c === "" ? card.dataset.miou : ious.get(card).get(c));
    const rules = {
      worst: (a, b) => value(a) - value(b),
      best: (a, b) => value(b) - value(a),
      name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
    };
    const found = cards.filter((card) => c === "" || ious.get(card).has(c)).sort(rules[order.value]);
    const shown = found.slice(0, all ? found.length : FEW);
    for (const card of cards) card.hidden = !shown.includes(card);
    gallery.append(...shown);
    document.getElementById("count").textContent = `${found.length} of ${cards.length} pictures`;
    more.hidden = shown.length === found.length;
    more.textContent = `Show all ${found.length}`;
  };

  /** Four panels a card, made when they are first asked for. */
  const layOut = () => {
    for (const panels of gallery.querySelectorAll(".panels")) {
      if (panels.children.length > 1) continue;
      for (const layer of ["photograph", "truth", "prediction", "errors"]) {
        const panel = panels.firstElementChild.cloneNode(true);
        panel.lastElementChild.remove();
        panel.dataset.layer = layer;
        panels.append(panel);
      }
    }
  };

  for (const radio of document.querySelectorAll("[name=view]")) {
    radio.addEventListener("change", () => {
      gallery.dataset.view = radio.value;
      if (radio.value === "all") layOut();
    });
  }
  gallery.addEventListener("input", (event) => {
    event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
  });
  document.getElementById("strength").addEventListener("input", (event) => {
    gallery.style.setProperty("--strength", event.target.value / 100);
  });
  more.addEventListener("click", () => {
    all = true;
    arrange();
  });
  ofClass.addEventListener("change", arrange);
  order.addEventListener("change", arrange);
  arrange();
};

const gallery = document.getElementById("gallery");
if (gallery) openGallery(gallery);
