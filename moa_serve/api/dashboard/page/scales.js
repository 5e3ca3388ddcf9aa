// Colours of numbers. Pure. Each colour is a pair, for the light theme and the dark one, which CSS light-dark() chooses from.
//
// Sequential scales go from the surface's brightness away, evenly in luminance, and through yellow, green and blue, which people who do not
// see red and green tell apart (ColorBrewer's YlGnBu, and viridis for the dark). The diverging one is orange against violet, for the same reason.

const SEQUENTIAL = {
  light: ["#f3f4e6", "#d3e8cd", "#9fd3bf", "#5db5b7", "#2f8bab", "#22609a", "#23397c", "#151c4e"],
  dark: ["#222a35", "#25405f", "#21607f", "#1f818b", "#36a389", "#74c178", "#bfd961", "#fbf2a0"],
};
const DIVERGING = {
  light: ["#8c4a06", "#c9751b", "#edb772", "#f1efe9", "#bdb5dd", "#8470b8", "#4b2a82"],
  dark: ["#ffbe6b", "#c67d34", "#6f4a28", "#2a3039", "#4c4473", "#8273bd", "#c3b5ff"],
};
const INKS = ["#000000", "#ffffff"]; // with these two, one always has a contrast of 4.5

function channels(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function mix(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [channels(stops[index]), channels(stops[index + 1])];
  const byte = (low, high) => Math.round(low + (high - low) * (place - index)).toString(16).padStart(2, "0");
  return `#${from.map((low, i) => byte(low, to[i])).join("")}`;
}

/** Relative luminance, as WCAG defines it. */
export function luminance(hex) {
  const [r, g, b] = channels(hex).map((byte) => (byte <= 10.31475 ? byte / 3294.6 : ((byte / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Contrast of two colours, 1 to 21, as WCAG defines it. */
export function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

/** What can be read best on it. */
export function inkOn(hex) {
  return contrast(hex, INKS[0]) >= contrast(hex, INKS[1]) ? INKS[0] : INKS[1];
}

/** A scale over [from, to]: its colours at a value, as {light, dark}. Equal ends count as a span of one. */
export function scaleOf({ from, to, isDiverging = false }) {
  const stops = isDiverging ? DIVERGING : SEQUENTIAL;
  const at = (value) => {
    const share = (value - from) / (to - from || 1);
    return { light: mix(stops.light, share), dark: mix(stops.dark, share) };
  };
  return { from, to, isDiverging, at };
}

/** The span of values, somewhat rounded, for a scale that uses all its colours; [0, 1] where there are none. */
export function spanOf(values, { isDiverging = false } = {}) {
  const found = values.filter((value) => value !== null && Number.isFinite(value));
  if (!found.length) return isDiverging ? { from: -1, to: 1 } : { from: 0, to: 1 };
  if (isDiverging) {
    const most = Math.max(0.02, ...found.map(Math.abs));
    return { from: -round(most, Math.ceil), to: round(most, Math.ceil) };
  }
  const [low, high] = [Math.min(...found), Math.max(...found)];
  const [from, to] = [round(low, Math.floor), round(high, Math.ceil)];
  return to - from >= 0.05 ? { from, to } : { from: Math.max(0, round(to - 0.05, Math.floor)), to: Math.max(to, 0.05) };
}

function round(value, how) {
  return how(Number((value * 50).toFixed(6))) / 50; // to 0.02, whatever binary fractions make of it
}

/** Puts a scale's colour at a value behind an element, and ink that can be read on it before it; null takes both away. */
export function paint(element, scale, value) {
  const pair = value === null ? null : scale.at(value);
  element.style.backgroundColor = pair ? `light-dark(${pair.light}, ${pair.dark})` : "";
  element.style.color = pair ? `light-dark(${inkOn(pair.light)}, ${inkOn(pair.dark)})` : "";
}

/** The whole scale as the background of a bar. */
export function paintLegend(element, { isDiverging }) {
  const { light, dark } = isDiverging ? DIVERGING : SEQUENTIAL;
  const colours = light.map((colour, index) => `light-dark(${colour}, ${dark[index]})`);
  element.style.backgroundImage = `linear-gradient(to right, ${colours.join(", ")})`;
}
