// Draws the figures that the page carries as JSON, in the page's own ink, and again when the screen turns light or dark.
"use strict";

const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function ink() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: read("--rule"), linecolor: read("--faint"), tickcolor: read("--faint") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: read("--sans"), size: 12, color: read("--soft") },
    hoverlabel: { bgcolor: read("--paper"), bordercolor: read("--faint"), font: { color: read("--ink") } },
    axis,
  };
}

function draw() {
  const { axis, ...common } = ink();
  for (const [name, plot] of Object.entries(plots)) {
    const layout = {
      ...plot.layout,
      ...common,
      xaxis: { ...plot.layout.xaxis, ...axis },
      yaxis: { ...plot.layout.yaxis, ...axis },
    };
    Plotly.react(name, plot.data, layout, { responsive: true, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
