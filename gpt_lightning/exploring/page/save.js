/** Files for the user: tables as CSV, views as PNG. */

import { element } from "./elements.js";

/** Two buttons. `rows()` returns the table, header first; `paint()` returns a canvas. */
export function saveButtons(name, { rows, paint }) {
  const label = name.replaceAll("-", " ");
  return element(
    "div",
    { class: "save" },
    element(
      "button",
      {
        type: "button",
        "aria-label": `Save ${label} as PNG`,
        onclick: () => savePicture(name, paint()),
      },
      "Save PNG",
    ),
    element(
      "button",
      {
        type: "button",
        "aria-label": `Save ${label} as CSV`,
        onclick: () => saveTable(name, rows()),
      },
      "Save CSV",
    ),
  );
}

function saveTable(name, rows) {
  save(`${name}.csv`, new Blob([toCsv(rows)], { type: "text/csv;charset=utf-8" }));
}

function savePicture(name, canvas) {
  canvas.toBlob((blob) => save(`${name}.png`, blob), "image/png");
}

function save(name, blob) {
  const address = URL.createObjectURL(blob);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** What a spreadsheet would run as a formula (OWASP: "CSV injection"). */
const FORMULA = /^[=+\-@\t\r\n]/;

/** RFC 4180: fields with a comma, a quote or a line break are quoted. A text like a formula begins with "'"; numbers stay. */
export function toCsv(rows) {
  const field = (value) => {
    const plain = value === null || value === undefined ? "" : String(value);
    const text = typeof value === "string" && FORMULA.test(plain) ? `'${plain}` : plain;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(field).join(",") + "\r\n").join("");
}
