"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");

  // Light and dark: as the system says, until the button says otherwise.
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme ? root.style.colorScheme === "dark" : dark.matches);
  const name = () => { theme.textContent = isDark() ? "Light colours" : "Dark colours"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  name();

  // One tip for everything: beside what it is about, inside the window.
  const place = (box) => {
    const gap = 10;
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
    const above = box.top - size.height - gap;
    const top = above >= 8 ? above : Math.min(box.bottom + gap, innerHeight - size.height - 8);
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(8, top))}px)`;
  };
  let about = null;
  const show = (content, target) => {
    tip.replaceChildren(...content);
    tip.hidden = false;
    about = target;
    place(about.getBoundingClientRect());
  };
  const hide = () => { tip.hidden = true; about = null; };
  // What has the focus is brought into view by scrolling, and keeps its tip.
  const follow = () => {
    if (about && document.activeElement?.contains(about)) place(about.getBoundingClientRect());
    else hide();
  };
  const element = (kind, text = "", style = "") => {
    const made = document.createElement(kind);
    made.textContent = text;
    made.className = style;
    return made;
  };

  // Marks of charts carry their text in a title, which the browser would show late and only to a mouse.
  const texts = new WeakMap();
  for (const title of all("svg :not(svg) > title")) {
    texts.set(title.parentElement, title.textContent);
    title.remove();
  }
  const marked = (target) => {
    for (let mark = target; mark instanceof SVGElement; mark = mark.parentElement) if (texts.has(mark)) return mark;
    return null;
  };
  const tell = (mark) => show([element("span", texts.get(mark))], mark);

  // The images: larger, with the network's first answers.
  const facts = JSON.parse(document.getElementById("data").textContent);
  const describe = (thumb) => {
    const [set, label, answers] = facts[Number(thumb.dataset.number)];
    const large = element("div", "", "thumb large");
    for (const key of ["backgroundPosition", "aspectRatio"]) large.style[key] = thumb.style[key];
    const asked = label === null ? set : `${set}, ${set === "real" ? "of" : "made for"} class ${label}`;
    const table = element("div", "", "answers");
    for (const [number, share] of answers) {
      const bar = element("i");
      bar.style.setProperty("--share", `${100 * share}%`);
      table.append(element("span", `class ${number}`), bar, element("span", `${(100 * share).toFixed(1)} %`));
    }
    show([large, element("b", asked), element("div", "the network's answer:"), table], thumb);
  };

  // A class that is pointed at stands out in every panel of the plane.
  const light = (number) => {
    for (const group of all("[data-plane]")) {
      group.classList.toggle("lit", number !== null);
      if (number !== null) for (const dot of all(".dot", group)) dot.classList.toggle("on", dot.dataset.k === number);
    }
  };

  const enter = (target) => {
    const thumb = target.closest?.("button.thumb");
    const mark = thumb ? null : marked(target);
    if (thumb) describe(thumb);
    else if (mark) tell(mark);
    else hide();
    const group = target.closest?.("[data-k]");
    light(group && group.closest("[data-planes]") ? group.dataset.k : null);
  };
  document.addEventListener("pointerover", (event) => enter(event.target));
  document.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible, .thumb")) enter(event.target); });
  document.addEventListener("focusout", () => { hide(); light(null); });
  document.addEventListener("scroll", follow, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // One tab stop for all images; arrows go to the nearest in their direction.
  for (const group of all("[data-roving]")) {
    const stops = all("button", group);
    const go = (next) => {
      for (const stop of stops) stop.tabIndex = stop === next ? 0 : -1;
      next.focus();
    };
    stops.forEach((stop, index) => { stop.tabIndex = index ? -1 : 0; });
    group.addEventListener("keydown", (event) => {
      const here = stops.indexOf(document.activeElement);
      if (here < 0) return;
      const box = stops[here].getBoundingClientRect();
      const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      const ends = { Home: 0, End: stops.length - 1, ArrowLeft: Math.max(0, here - 1), ArrowRight: Math.min(stops.length - 1, here + 1) };
      let next = stops[ends[event.key]];
      if (rows) {
        const away = (stop) => {
          const other = stop.getBoundingClientRect();
          const down = (other.top - box.top) * rows;
          return down > 4 ? down * 4 + Math.abs(other.left - box.left) : Infinity;
        };
        const best = stops.reduce((one, other) => (away(other) < away(one) ? other : one));
        next = away(best) < Infinity ? best : stops[here];
      }
      if (next) { event.preventDefault(); go(next); }
    });
    group.addEventListener("click", (event) => { const stop = event.target.closest("button"); if (stop) { go(stop); describe(stop); } });
  }

  // Curves can be walked along with the arrow keys.
  for (const chart of all("svg.lines")) {
    const points = all(".point", chart);
    let here = -1;
    chart.tabIndex = 0;
    chart.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by || !points.length) return;
      event.preventDefault();
      points[here]?.classList.remove("on");
      here = Math.min(points.length - 1, Math.max(0, here + by));
      points[here].classList.add("on");
      tell(points[here]);
      said.textContent = texts.get(points[here]);
    });
    chart.addEventListener("focusout", () => { points[here]?.classList.remove("on"); here = -1; });
  }

  // Tables are sorted by a button in each head; the order is told.
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = element("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      button.addEventListener("click", () => {
        const first = head.dataset.first ?? "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        for (const each of heads) each.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const compare = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b), "en", { numeric: true }) : a - b);
        body.append(...[...body.rows].sort((a, b) => sign * compare(value(a), value(b))));
        said.textContent = `sorted by ${button.textContent}, ${order}`;
      });
    });
  }

  for (const button of all("button.copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.of).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // The contents say where one is.
  const links = new Map(all(".contents a").map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) {
      for (const link of links.values()) { link.classList.remove("here"); link.removeAttribute("aria-current"); }
      links.get(target.id)?.classList.add("here");
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const section of all("main [id]")) if (links.has(section.id)) watch.observe(section);

  // On paper nothing is folded away.
  addEventListener("beforeprint", () => { for (const each of all("details:not([open])")) { each.open = true; each.dataset.opened = ""; } });
  addEventListener("afterprint", () => { for (const each of all("details[data-opened]")) { each.open = false; delete each.dataset.opened; } });
})();
