// SPDX-License-Identifier: Apache-2.0
// The report's 3D view of the tokens (a plain 2D canvas, orbit by mouse) and its key frames with the lit patches.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // t from 0 to 1 -> dark blue, green, yellow.
  function ramp(t) {
    const at = [[48, 18, 110], [38, 110, 170], [60, 180, 110], [250, 220, 60]];
    const x = Math.min(0.9999, Math.max(0, t)) * 3, i = Math.floor(x), f = x - i;
    return at[i].map((c, k) => Math.round(c + (at[i + 1][k] - c) * f));
  }

  function colours(tokens, by) {
    const n = tokens.rgb.length, most = Math.max(1e-12, ...tokens.share);
    return Array.from({ length: n }, (_, i) => {
      if (by === "layer") return ramp(tokens.layer[i] / Math.max(1, tokens.layers - 1));
      if (by === "share") return ramp(Math.sqrt(tokens.share[i] / most));
      const c = tokens.rgb[i];
      return [c >> 16, (c >> 8) & 255, c & 255];
    });
  }

  // Line segments [x, y, z, x, y, z] in millimetres: edges of a box, and of a camera's pyramid.
  function boxLines(b) {
    const c = (k) => [0, 1, 2].map((a) => b[a] + (k & (1 << a) ? 0.5 : -0.5) * b[a + 3]);
    const lines = [];
    for (let k = 0; k < 8; k++) for (let a = 0; a < 3; a++) if (!(k & (1 << a))) lines.push([...c(k), ...c(k | (1 << a))]);
    return lines;
  }

  function scene(root, tokens, pictures) {
    const canvas = root.querySelector("canvas.scene"), slider = root.querySelector(".layer");
    const by = root.querySelector(".by"), said = root.querySelector(".said"), play = root.querySelector(".play");
    const n = tokens.rgb.length, middle = [0, 1, 2].map((a) => {
      let low = Infinity, high = -Infinity;
      for (let i = a; i < 3 * n; i += 3) { low = Math.min(low, tokens.xyz[i]); high = Math.max(high, tokens.xyz[i]); }
      return n ? [(low + high) / 2, high - low] : [0, 1];
    });
    const size = Math.hypot(...middle.map((m) => m[1])) || 1;
    let turn = 0.9, tilt = 0.55, zoom = 1, paint = colours(tokens, by.value);
    const lines = [];
    for (const p of pictures) for (const line of p.lines) lines.push([line, "#3b82d6"]);
    for (const b of tokens.evidence) for (const line of boxLines(b)) lines.push([line, "#37c8c8"]);
    for (const b of tokens.boxes) for (const line of boxLines(b)) lines.push([line, "#e0762a"]);

    function draw() {
      const wide = canvas.clientWidth, high = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
      canvas.width = wide * ratio; canvas.height = high * ratio;
      const g = canvas.getContext("2d");
      g.scale(ratio, ratio); g.fillStyle = "#14171c"; g.fillRect(0, 0, wide, high);
      const [ct, st, cp, sp] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
      const scale = (zoom * Math.min(wide, high) * 1.7) / size;
      const project = (x, y, z) => {
        const dx = x - middle[0][0], dy = y - middle[1][0], dz = z - middle[2][0];
        const right = ct * dy - st * dx, back = ct * dx + st * dy;
        const depth = 1 / Math.max(0.2, 1.4 - (back * cp + dz * sp) / size);
        return [wide / 2 + right * scale * depth, high / 2 - (dz * cp - back * sp) * scale * depth, depth];
      };
      for (const [l, colour] of lines) {
        const a = project(l[0], l[1], l[2]), b = project(l[3], l[4], l[5]);
        g.strokeStyle = colour; g.beginPath(); g.moveTo(a[0], a[1]); g.lineTo(b[0], b[1]); g.stroke();
      }
      const layer = Number(slider.value), seen = [];
      for (let i = 0; i < n; i++) {
        const at = project(tokens.xyz[3 * i], tokens.xyz[3 * i + 1], tokens.xyz[3 * i + 2]);
        seen.push([at[2], at[0], at[1], i]);
      }
      seen.sort((a, b) => a[0] - b[0]);
      let alive = 0;
      for (const [depth, x, y, i] of seen) {
        const there = tokens.layer[i] >= layer, r = Math.max(1, 3.2 * depth * Math.sqrt(zoom));
        alive += there;
        g.fillStyle = there ? `rgb(${paint[i]})` : "rgba(150,150,150,0.22)";
        const half = there ? r : r / 2;
        g.fillRect(x - half, y - half, 2 * half, 2 * half);
      }
      for (const c of tokens.clicks) {
        const at = project(...c);
        g.strokeStyle = "#ff4060"; g.lineWidth = 2; g.beginPath(); g.arc(at[0], at[1], 8, 0, 7); g.stroke(); g.lineWidth = 1;
      }
      said.textContent = `layer ${layer}: sees ${tokens.per_layer[layer] ?? 0} tokens` +
        (n < tokens.all ? ` (${n} of ${tokens.all} are drawn)` : "");
    }

    canvas.addEventListener("pointerdown", (e) => canvas.setPointerCapture(e.pointerId));
    canvas.addEventListener("pointermove", (e) => {
      if (!e.buttons) return;
      turn -= e.movementX * 0.01; tilt = Math.min(1.55, Math.max(-0.3, tilt + e.movementY * 0.01)); draw();
    });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault(); zoom = Math.min(12, Math.max(0.3, zoom * Math.exp(-e.deltaY * 0.001))); draw();
    }, { passive: false });
    slider.addEventListener("input", draw);
    by.addEventListener("change", () => { paint = colours(tokens, by.value); draw(); });
    let timer = null;
    play.addEventListener("click", () => {
      clearInterval(timer); slider.value = 0; draw();
      timer = setInterval(() => {
        if (Number(slider.value) >= tokens.layers - 1) { clearInterval(timer); return; }
        slider.value = Number(slider.value) + 1; draw();
      }, 400);
    });
    window.addEventListener("resize", draw);
    draw();
  }

  function picture(canvas, p, lit) {
    const image = new Image();
    image.onload = () => {
      canvas.width = image.width; canvas.height = image.height;
      const g = canvas.getContext("2d"), [left, top, right, bottom] = p.area;
      g.drawImage(image, 0, 0);
      if (!p.rows || !lit) return; // not known: the whole picture
      g.fillStyle = "rgba(0,0,0,0.62)"; g.fillRect(0, 0, image.width, image.height);
      const w = ((right - left) * image.width) / p.columns, h = ((bottom - top) * image.height) / p.rows;
      for (const k of lit) {
        const x = left * image.width + (k % p.columns) * w, y = top * image.height + Math.floor(k / p.columns) * h;
        g.drawImage(image, x, y, w, h, x, y, w, h);
      }
    };
    image.src = "data:image/jpeg;base64," + p.jpeg;
  }

  document.querySelectorAll("section[data-answer]").forEach((root) => {
    const answer = data.answers[Number(root.dataset.answer)];
    if (answer.tokens) scene(root, answer.tokens, data.pictures);
    root.querySelectorAll("canvas[data-picture]").forEach((canvas) => {
      const k = Number(canvas.dataset.picture);
      picture(canvas, data.pictures[k], answer.lit && answer.lit[k]);
    });
  });
})();
