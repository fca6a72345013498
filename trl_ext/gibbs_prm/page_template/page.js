"use strict";
(() => {
  const BATCH = 200;  // rows of the overview that are drawn at once
  const DIRECTIONS = ["ascending", "descending"];
  const UNSORTED = { key: "reward", direction: "ascending", filter: "" };
  const byId = (id) => document.getElementById(id);
  const [filter, found, more] = ["filter", "found", "more"].map(byId);
  const headers = [...byId("steps").tHead.rows[0].cells];
  const body = byId("steps").tBodies[0];
  const collator = new Intl.Collator("en", { numeric: true });

  const steps = [...document.querySelectorAll("tr[data-r]")].map((row) => {
    const { n, name, label } = row.closest("article").dataset;
    const place = byId(row.id.replace("r", "s"));
    const entry = {
      row, place, name, label,
      completion: Number(n),
      step: Number(row.id.split("r")[1]),
      reward: Number(row.dataset.r),
      prefix: Number(row.dataset.p),
      error: Number(row.dataset.e ?? NaN),
      text: place.textContent,
    };
    entry.searched = [name, label, row.cells[0].textContent, entry.text].join("\n").toLowerCase();
    return entry;
  });

  // What is no number, or has no text, comes last in both directions; equals stay in page order.
  const isMissing = (value) => value === "" || Number.isNaN(value);
  const compare = (one, other) =>
    typeof one === "string" ? collator.compare(one, other) : one < other ? -1 : one > other ? 1 : 0;
  const sorted = (entries, key, direction) => {
    const sign = direction === "ascending" ? 1 : -1;
    return [...entries].sort((a, b) =>
      isMissing(a[key]) || isMissing(b[key])
        ? isMissing(a[key]) - isMissing(b[key])
        : sign * compare(a[key], b[key]));
  };

  const cellOf = (entry, key) => {
    const cell = document.createElement("td");
    const link = (target, text) => {
      const anchor = cell.appendChild(document.createElement("a"));
      anchor.href = `#${target}`;
      anchor.textContent = text;
    };
    const cells = entry.row.cells;
    if (key === "completion") link(`c${entry.completion}`, `${entry.completion} ${entry.name}`);
    else if (key === "step") link(entry.place.id, cells[0].textContent);
    else if (key === "label") cell.textContent = entry.label;
    else if (key === "text") {
      cell.dir = "auto";
      cell.textContent = cells[cells.length - 1].textContent;
    } else {
      const source = cells[["reward", "prefix", "error"].indexOf(key) + 1];
      if (key !== "error" || entry.row.dataset.e !== undefined) cell.textContent = source.textContent;
      if (key === "reward") cell.className = source.className;
    }
    return cell;
  };

  let state = UNSORTED;
  let shown = [];
  const drawMore = () => {
    const rows = shown.slice(body.rows.length, body.rows.length + BATCH).map((entry) => {
      const row = document.createElement("tr");
      row.append(...headers.map((header) => cellOf(entry, header.dataset.key)));
      return row;
    });
    body.append(...rows);
    more.hidden = body.rows.length >= shown.length;
    more.textContent = `Show more (${shown.length - body.rows.length} left)`;
  };
  const draw = () => {
    const wanted = state.filter.toLowerCase();
    shown = sorted(steps.filter((entry) => entry.searched.includes(wanted)), state.key, state.direction);
    for (const header of headers) {
      if (header.dataset.key === state.key) header.setAttribute("aria-sort", state.direction);
      else header.removeAttribute("aria-sort");
    }
    found.value = `${shown.length} of ${steps.length} steps`;
    body.replaceChildren();
    drawMore();
  };

  // The view is a function of the address alone, so that a link reproduces it. An address that
  // names a place, such as #c3s2, leaves the view as it is.
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (location.hash !== "" && !asked.has("sort") && !asked.has("filter")) return;
    const [key, direction] = (asked.get("sort") ?? "").split(",");
    const isKnown = headers.some((header) => header.dataset.key === key) && DIRECTIONS.includes(direction);
    state = { ...UNSORTED, ...(isKnown && { key, direction }), filter: asked.get("filter") ?? "" };
    filter.value = state.filter;
    draw();
  };
  const change = (changes) => {
    state = { ...state, ...changes };
    const filtered = state.filter && `&${new URLSearchParams({ filter: state.filter })}`;
    history.replaceState(null, "", `#sort=${state.key},${state.direction}${filtered}`);
    draw();
  };

  for (const header of headers) {
    header.firstElementChild.addEventListener("click", () => {
      const { key } = header.dataset;
      const isReversed = state.key === key && state.direction === "ascending";
      change({ key, direction: DIRECTIONS[Number(isReversed)] });
    });
  }
  filter.addEventListener("input", () => change({ filter: filter.value }));
  more.addEventListener("click", drawMore);
  window.addEventListener("hashchange", read);
  byId("overview").hidden = steps.length === 0;
  draw();
  read();

  // Tokens come with two bare numbers to keep the file small; words are added when one is read.
  document.addEventListener("pointerover", ({ target }) => {
    const token = target.closest?.("i[title]");
    if (!token || token.title.includes("\n")) return;
    const [logRatio, score] = token.title.split(" / ");
    token.title = `${JSON.stringify(token.textContent)}\nlog-ratio ${logRatio} nats\nscore ${score}`;
  });
})();
