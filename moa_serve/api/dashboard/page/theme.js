// Before anything is painted: the theme that was chosen by hand, if any. No module, so that it runs at once.
try {
  const chosen = localStorage.getItem("moa-serve theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage is allowed here: the system's theme it is.
}
