// node report_page.mjs PAGE OUTPUT CHROMIUM: opens a report in a headless browser and prints what is wrong with it as JSON.
// Light and dark, phone and desk: console errors, overflow, axe's rules; contrast; sorting; a picture of each and a PDF.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

// The packages lie where NODE_PATH says, which `import` does not read.
const require = createRequire(join(process.env.NODE_PATH, "here.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [page_path, output, executablePath] = process.argv.slice(2);
const wrong = [];

// axe cannot look behind a graphic (its "imgNode"): there, text and shapes are held to the page's ground here.
const graphics = () => {
  const rgb = (text) => text.match(/[\d.]+/g).slice(0, 3).map((value) => {
    const share = Number(value) / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = (text) => rgb(text).reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  const found = [];
  for (const element of document.querySelectorAll("svg text, svg .part, svg .line")) {
    const style = getComputedStyle(element);
    const colour = element.matches(".line") ? style.stroke : style.fill;
    const least = element.matches("text") ? 4.5 : 3;
    const contrast = ratio(luminance(colour), ground);
    if (contrast < least) found.push(`${element.tagName}.${element.getAttribute("class")}: ${contrast.toFixed(2)} < ${least}`);
  }
  return [...new Set(found)];
};

const audit = async (page, what, options) => {
  await page.evaluate(axe);
  const found = await page.evaluate((given) => axe.run({ exclude: given.exclude }, given.options), options);
  for (const kind of ["violations", "incomplete"]) {
    for (const rule of found[kind]) wrong.push(`${what}: axe ${kind}, ${rule.id}, ${rule.nodes.length}: ${rule.nodes[0].html.slice(0, 120)}`);
  }
};

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
for (const colorScheme of ["light", "dark"]) {
  for (const width of [390, 1280]) {
    const what = `${colorScheme}-${width}`;
    const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
    page.on("console", (message) => wrong.push(`${what}: console ${message.type()}: ${message.text()}`));
    page.on("pageerror", (error) => wrong.push(`${what}: ${error}`));
    page.on("request", (request) => request.url().startsWith("http") && wrong.push(`${what}: asks for ${request.url()}`));
    await page.goto(`file://${page_path}`);
    await page.screenshot({ path: join(output, `${what}.png`), fullPage: true });
    const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (over > 0) wrong.push(`${what}: ${over} pixels wider than the window`);
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    await audit(page, what, { exclude: [], options: { runOnly: tags, rules: { "color-contrast": { enabled: false } } } });
    // A cell that is scrolled out of sight has no background to axe: contrast is judged where all of a table shows.
    await page.setViewportSize({ width: 3000, height: 900 });
    await page.addStyleTag({ content: "main { max-width: none !important }" });
    await audit(page, `${what}, contrast`, { exclude: ["svg"], options: { runOnly: ["color-contrast"] } });
    wrong.push(...(await page.evaluate(graphics)).map((text) => `${what}: ${text}`));
    const head = page.locator("th button").last();
    await head.click();
    if (!(await page.locator("th[aria-sort]").count())) wrong.push(`${what}: a click on a head sorts nothing`);
    if (what === "light-1280") await page.pdf({ path: join(output, "print.pdf"), format: "A4" });
    await page.close();
  }
}
await browser.close();
console.log(JSON.stringify(wrong, null, 1));
