// Ask the page in a headless Chromium and print the answer that it shows:  node ask.mjs URL PROMPT TOKENS
import { chromium } from "playwright-core";

const [url, prompt, limit] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--disable-gpu", "--disable-quic"],
});
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(120_000);
  page.on("pageerror", (error) => console.error(String(error)));
  const reaches = async (state) => {
    const text = await page.locator("#state", { hasText: new RegExp(`${state}|failed`) }).textContent();
    if (text.startsWith("failed")) throw new Error(text);
    return text;
  };
  await page.goto(url);
  await reaches("ready");
  await page.getByLabel("Prompt").fill(prompt);
  await page.getByLabel("tokens").fill(limit);
  await page.getByRole("button").click();
  console.error(await reaches("done"));
  console.log(await page.locator("output").textContent());
} finally {
  await browser.close();
}
