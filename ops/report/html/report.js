"use strict";
// The table of rollouts: filters, order, pages, and the text of a rollout with its tokens coloured by divergence.
// All data are in this page (see ops/report/page.py for their form); text goes in as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 50;
  const at = Object.fromEntries(data.columns.map((column, place) => [column.name, place]));
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const form = document.getElementById("filters");
  const search = document.getElementById("search");
  const pager = document.getElementById("pager");
  const state = { order: "place", down: false, page: 0, matching: data.rows };

  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // --- reading the data ---

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const numbers = (text, width, method) => {
    const view = new DataView(bytes(text).buffer);
    return Array.from({ length: view.byteLength / width }, (_, place) => view[method](place * width, true));
  };
  const piecesOf = (reading) => numbers(reading.pieces, data.wide ? 4 : 2, data.wide ? "getUint32" : "getUint16");
  // Its own alone: a rollout may be named as what every object has, "constructor" say.
  const readingOf = (rid) => (Object.hasOwn(data.readings, rid) ? data.readings[rid] : undefined);
  const texts = new Map(); // of rollouts, in lower case, once they are searched
  const textOf = (row) => {
    const rid = row[at.rid];
    if (!texts.has(rid)) {
      const reading = readingOf(rid);
      const written = reading ? reading.prompt + " " + piecesOf(reading).map((piece) => data.pieces[piece][1]).join("") : "";
      texts.set(rid, (rid + " " + written).toLowerCase());
    }
    return texts.get(rid);
  };

  const shown = (column, value) => {
    if (value === null) return "–";
    if (column.name === "correct") return value ? "right" : "wrong";
    if (column.kind === "count") return value.toLocaleString("en");
    if (column.kind === "number") return value === 0 ? "0" : Number(value.toPrecision(3)).toString();
    return String(value);
  };

  // --- filters and order ---

  const choices = () => {
    for (const box of form.querySelectorAll("select")) {
      const column = data.columns[at[box.dataset.filter]];
      const counts = new Map();
      for (const row of data.rows) {
        const name = shown(column, row[at[column.name]]);
        counts.set(name, (counts.get(name) || 0) + 1);
      }
      box.append(new Option("all", ""));
      for (const [name, count] of [...counts].sort((a, b) => b[1] - a[1])) {
        box.append(new Option(`${name} (${count.toLocaleString("en")})`, "=" + name));
      }
    }
  };

  const select = () => {
    const wanted = [...form.querySelectorAll("select")]
      .filter((box) => box.value)
      .map((box) => [data.columns[at[box.dataset.filter]], box.value.slice(1)]);
    const words = search.value.toLowerCase();
    state.matching = data.rows.filter(
      (row) =>
        wanted.every(([column, value]) => shown(column, row[at[column.name]]) === value) &&
        (!words || textOf(row).includes(words)),
    );
    sort();
  };

  const sort = () => {
    const place = at[state.order];
    const sign = state.down ? -1 : 1;
    const compare = (a, b) => {
      const [x, y] = [a[place], b[place]];
      if (x === y) return a[at.place] - b[at.place];
      if (x === null || y === null) return x === null ? 1 : -1; // what is not known comes last either way
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    };
    state.matching = [...state.matching].sort(compare);
    state.page = 0;
    draw();
  };

  // --- the table ---

  const head = () => {
    for (const column of data.columns) {
      const cell = make("th", column.kind === "text" ? "" : "number");
      const button = make("button", "", column.title);
      cell.scope = "col";
      button.type = "button";
      button.title = column.meaning;
      button.dataset.order = column.name;
      button.addEventListener("click", () => {
        state.down = state.order === column.name ? !state.down : column.kind !== "text" && column.name !== "place";
        state.order = column.name;
        sort();
      });
      cell.append(button);
      table.tHead.rows[0].append(cell);
    }
  };

  const rowOf = (row) => {
    const line = make("tr", "row");
    line.tabIndex = 0;
    line.setAttribute("aria-expanded", "false");
    line.dataset.rid = row[at.rid];
    data.columns.forEach((column, place) => {
      const text = shown(column, row[place]);
      const mark = column.name === "arm" || column.name === "correct" ? text : column.name === "rid" ? "id" : "";
      line.append(make("td", column.kind === "text" ? mark : "number", text));
    });
    line.addEventListener("click", () => toggle(line, row));
    line.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") toggle(line, row);
      else if (event.key === "ArrowDown") step(line, "nextElementSibling");
      else if (event.key === "ArrowUp") step(line, "previousElementSibling");
      else return;
      event.preventDefault();
    });
    return line;
  };

  const step = (line, direction) => {
    let next = line[direction];
    while (next && !next.classList.contains("row")) next = next[direction];
    if (next) next.focus();
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(state.matching.length / PAGE));
    const begin = state.page * PAGE;
    const part = state.matching.slice(begin, begin + PAGE);
    body.replaceChildren(...part.map(rowOf));
    const total = state.matching.length.toLocaleString("en");
    document.getElementById("count").textContent = part.length
      ? `${begin + 1} to ${begin + part.length} of ${total} that match`
      : "No rollout matches.";
    pager.querySelector("span").textContent = `page ${state.page + 1} of ${pages}`;
    for (const button of pager.querySelectorAll("button")) {
      const back = button.dataset.page === "first" || button.dataset.page === "back";
      button.disabled = back ? state.page === 0 : state.page === pages - 1;
      button.onclick = () => {
        state.page = { first: 0, back: state.page - 1, on: state.page + 1, last: pages - 1 }[button.dataset.page];
        draw();
      };
    }
    for (const cell of table.tHead.rows[0].cells) {
      const sorted = cell.firstChild.dataset.order === state.order;
      cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    }
  };

  // --- one rollout ---

  const toggle = (line, row) => {
    const open = line.getAttribute("aria-expanded") === "true";
    line.setAttribute("aria-expanded", String(!open));
    if (open) {
      line.nextElementSibling.remove();
      return;
    }
    const under = make("tr", "reading");
    const cell = make("td");
    cell.colSpan = data.columns.length;
    cell.append(...reading(row));
    under.append(cell);
    line.after(under);
  };

  const reading = (row) => {
    const found = readingOf(row[at.rid]);
    if (!found) return [make("p", "facts", data.why_no_text)];
    const pieces = piecesOf(found);
    const divergence = numbers(found.divergence, 4, "getFloat32");
    const readout = make("p", "readout", "Point at a token, or move along them with ← and →.");
    const line = make("p", "tokens");
    line.tabIndex = 0;
    line.setAttribute("role", "group");
    line.setAttribute("aria-label", "Tokens of " + row[at.rid]);
    const spans = pieces.map((piece, place) => token(data.pieces[piece], divergence[place], place, found));
    const scissors = row[at.arm] === "control" ? "where the policy would have cut" : "cut: the tokens before it are kept";
    spans.forEach((span, place) => {
      if (place === found.keep) line.append(mark("✂", "mark cut", scissors));
      if (place === found.trigger) line.append(mark("◂", "mark trigger", "trigger: the policy fired here"));
      line.append(span);
    });
    if (found.trigger === spans.length && found.keep < spans.length) {
      line.append(mark("◂", "mark trigger", "trigger: the policy fired here"));
    }
    follow(line, spans, readout);
    return [facts(row, found, spans.length), make("p", "prompt", "prompt: " + printable(found.prompt)), line, readout, key()];
  };

  const mark = (sign, className, meaning) => {
    const element = make("span", className, sign);
    element.title = meaning;
    return element;
  };

  const printable = (text) => text.replace(/\n/g, "↵\n").replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, "·");

  const token = ([id, text], nats, place, found) => {
    const part = place < found.keep ? "kept" : place < found.trigger ? "detection" : "overshoot";
    const known = !Number.isNaN(nats);
    const span = make("span", `token ${part}${known ? "" : " unscored"}`, printable(text));
    if (known) {
      const [low, high] = data.scale;
      const depth = (Math.log10(Math.max(nats, 1e-6)) - low) / Math.max(high - low, 1e-9);
      span.style.setProperty("--d", (0.85 * Math.min(1, Math.max(0, depth))).toFixed(3));
    }
    const divergence = known ? `${Number(nats.toPrecision(4))} nats` : "not scored";
    span.title = `position ${place}, id ${id}, ${divergence}, ${part}`;
    return span;
  };

  const follow = (line, spans, readout) => {
    let current = -1;
    const show = (place) => {
      if (current >= 0) spans[current].classList.remove("current");
      current = Math.min(spans.length - 1, Math.max(0, place));
      if (current < 0) return;
      spans[current].classList.add("current");
      readout.textContent = `“${spans[current].textContent}”  ${spans[current].title}`;
    };
    line.addEventListener("mouseover", (event) => {
      const place = spans.indexOf(event.target);
      if (place >= 0) show(place);
    });
    line.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      show(current + (event.key === "ArrowRight" ? 1 : -1));
      spans[current].scrollIntoView({ block: "nearest" });
      event.preventDefault();
    });
  };

  const facts = (row, found, recorded) => {
    const value = (name) => row[at[name]];
    const parts = [
      `kept ${value("kept")}`,
      `detection ${value("detection")}`,
      `overshoot ${value("overshoot")}`,
      `threshold ${shown({ kind: "number" }, value("threshold"))} nats`,
    ];
    if (value("generated") > recorded) parts.push(`${value("generated") - recorded} more tokens were not scored`);
    return make("p", "facts", parts.join(" · "));
  };

  const key = () => {
    const line = make("p", "facts");
    const entry = (...children) => {
      const item = make("span", "key");
      item.append(...children);
      return item;
    };
    const swatch = (part) => make("span", "swatch token " + part);
    const ends = data.scale.map((value) => Number((10 ** value).toPrecision(2)));
    line.append(
      entry(`divergence ${ends[0]} `, make("span", "scale"), ` ${ends[1]} nats`),
      entry(swatch("detection"), " detection: from the cut ✂ to the trigger ◂"),
      entry(swatch("overshoot"), " overshoot: after the trigger"),
    );
    return line;
  };

  // --- begin ---

  choices();
  head();
  form.hidden = pager.hidden = false;
  form.addEventListener("change", select);
  search.addEventListener("input", select);
  form.addEventListener("submit", (event) => event.preventDefault());
  // Not the form's own reset event: that comes before the fields are empty.
  form.querySelector("button").addEventListener("click", (event) => {
    event.preventDefault();
    form.reset();
    select();
  });
  select();
})();
