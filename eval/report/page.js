"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  for (const part of document.querySelectorAll(".script")) part.hidden = false;

  // A heading sorts: numbers by what they are, with their absence last; names as words.
  const table = find("table");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const key = (row) => row.cells[column].dataset.value;
    heading.querySelector("button").addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      const rows = [...body.rows];
      const numeric = rows.some((row) => key(row) !== undefined);
      rows.sort((one, other) => {
        if (!numeric) {
          const order = one.cells[column].textContent.localeCompare(other.cells[column].textContent);
          return up ? order : -order;
        }
        const [a, b] = [key(one), key(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return up ? a - b : b - a;
      });
      body.append(...rows);
      for (const each of headings) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });

  const measure = find("measure");
  if (measure) {
    const show = () => {
      for (const part of document.querySelectorAll("[data-measure]")) part.hidden = part.dataset.measure !== measure.value;
    };
    measure.addEventListener("change", show);
    show();
  }

  const compare = find("compare");
  if (!compare) return;
  const [left, right, sample, cut, stage] = ["left", "right", "sample", "cut", "stage"].map(find);
  const picture = (choice) => {
    const cell = find("grid").tBodies[0].rows[Number(choice.value)].cells[Number(sample.value) + 1];
    return cell ? cell.querySelector("img") : null;
  };
  const put = (image, source) => {
    image.hidden = !source;
    if (!source) return;
    image.src = source.src;
    image.alt = source.alt;
    image.className = source.className;
    stage.classList.toggle("wide", source.classList.contains("wide"));
  };
  const word = (choice) => choice.options[choice.selectedIndex].text;
  const move = () => {
    stage.style.setProperty("--cut", `${cut.value}%`);
    cut.setAttribute("aria-valuetext", `${cut.value} percent ${word(left)}, the rest ${word(right)}`);
  };
  const show = () => {
    put(find("under"), picture(left));
    put(find("over"), picture(right));
    find("left_name").textContent = word(left);
    find("right_name").textContent = word(right);
    find("condition").textContent = word(sample);
    move();
  };
  left.value = compare.dataset.left;
  right.value = compare.dataset.right;
  for (const choice of [left, right, sample]) choice.addEventListener("change", show);
  cut.addEventListener("input", move);
  show();
})();
