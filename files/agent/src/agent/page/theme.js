// The chosen theme, before anything is painted. Not a module: modules run after the page is parsed.
"use strict";

try {
  const chosen = localStorage.getItem("agent-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser may forbid the page to store anything.
}
