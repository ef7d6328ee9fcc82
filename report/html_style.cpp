// The style sheet of report.html: light and dark, narrow and wide, print.
#include "report/html.h"

namespace kompakt {

const char* html_style() {
  return R"css(
:root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1a202c;--soft:#5b6676;--rule:#e3e7ed;--accent:#0f766e;--accent-soft:#ccebe6;--blue:#2563eb;--blue-soft:#dbe6fd;--grey:#7b8794;--bad:#b42318;--bad-soft:#fbdcd8;--good:#157f3c;--good-soft:#d7f0df;--warn:#92580a;--warn-soft:#fcecc9;--c0:#2563eb;--c1:#d97706;--c2:#0f766e;--c3:#9333ea;--c4:#be123c;--c5:#64748b}
@media (prefers-color-scheme:dark){:root{--paper:#0f141b;--card:#171e27;--ink:#e7ecf3;--soft:#9aa7b8;--rule:#2a3441;--accent:#2dd4bf;--accent-soft:#134b46;--blue:#6ea0ff;--blue-soft:#1f3767;--grey:#94a3b8;--bad:#ff8a7d;--bad-soft:#5a211c;--good:#5fd58a;--good-soft:#174a2b;--warn:#f3c464;--warn-soft:#4d3a12;--c0:#6ea0ff;--c1:#f6a94b;--c2:#2dd4bf;--c3:#c084fc;--c4:#fb7185;--c5:#94a3b8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
header.top{padding:8px 4px 18px}
header.top .name{color:var(--soft);font-weight:600;letter-spacing:.02em;margin:0 0 6px}
h1{font-size:clamp(22px,3.4vw,34px);line-height:1.22;margin:0 0 10px;letter-spacing:-.015em;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 4px;letter-spacing:-.01em}
h3{font-size:14px;margin:18px 0 6px;color:var(--soft);font-weight:600}
p{margin:6px 0}
.meta{color:var(--soft);font-size:13px}
.meta span:not(:last-child)::after{content:"·";margin:0 8px;color:var(--grey)}
.lead{color:var(--soft);font-size:13.5px;margin:0 0 12px}
section,.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px}
section{padding:18px 20px 20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0 0 16px}
.tile{padding:13px 16px}
.tile b{display:block;font-size:24px;line-height:1.2;letter-spacing:-.02em;white-space:nowrap}
.tile span{color:var(--soft);font-size:12.5px}
.tile small{display:block;color:var(--soft);font-size:12px}
.tile.main{background:var(--accent-soft);border-color:transparent}
.tile.main span,.tile.main small{color:inherit;opacity:.8}
.scroll{overflow-x:auto;margin:0 -4px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{font-weight:600;color:var(--soft);text-align:left;font-size:12.5px;white-space:nowrap}
th,td{padding:7px 9px;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
.num{text-align:right;white-space:nowrap}
td.bar{position:relative;min-width:96px}
td.bar::before{content:"";position:absolute;left:6px;right:6px;bottom:3px;height:3px;border-radius:2px;background:var(--rule)}
td.bar::after{content:"";position:absolute;left:6px;bottom:3px;height:3px;border-radius:2px;background:var(--blue);width:calc((100% - 12px)*var(--w,1));max-width:calc((100% - 12px));clip-path:inset(0 calc(100% - var(--share)) 0 0)}
td.bar.dim::after{background:var(--grey)}
td.bar.bad::after{background:var(--c1)}
tr.artifact td.bar::after{background:var(--accent)}
tr.teacher td.bar::after{background:var(--grey)}
tr.artifact{font-weight:600;background:color-mix(in srgb,var(--accent-soft) 45%,transparent)}
tr.total td{font-weight:600;border-top:1px solid var(--soft)}
tr.teacher td:first-child,tr.artifact td:first-child{white-space:nowrap}
small{color:var(--soft);font-weight:400;font-size:12px}
small.off{color:var(--warn);font-weight:600}
.tag{display:inline-block;font-size:11px;padding:0 7px;border-radius:99px;background:var(--blue-soft);color:var(--ink);font-weight:500}
.mono,code{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:12px}
.hash{overflow-wrap:anywhere;color:var(--soft)}
ul.plain{list-style:none;margin:8px 0 0;padding:0}
ul.plain li{padding:7px 0;border-bottom:1px solid var(--rule);display:flex;gap:12px;align-items:baseline;flex-wrap:wrap}
ul.plain li:last-child{border:0}
.pill{flex:none;font-size:12px;font-weight:600;padding:1px 10px;border-radius:99px}
.yes{background:var(--good-soft);color:var(--good)}
.no{background:var(--bad-soft);color:var(--bad)}
li .note{color:var(--soft);font-size:13px;margin-left:auto}
section.worse{border-left:4px solid var(--bad)}
section.warn{border-left:4px solid var(--warn)}
section ul{margin:6px 0 0;padding-left:20px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:14px 22px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:13.5px;margin:6px 0}
svg.chart{width:100%;height:auto;display:block;overflow:visible}
svg.chart text{font-size:12.5px;fill:var(--soft);font-family:inherit}
.middle{text-anchor:middle}.end{text-anchor:end}
svg .title{font-size:12.5px}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .trail{fill:none;stroke:var(--grey);stroke-width:1.4;stroke-dasharray:3 4;opacity:.7}
svg .whisker{stroke:currentColor;stroke-width:1.5;opacity:.75}
svg .cloud{fill:var(--grey);opacity:.45}
svg .gone{fill:var(--c1)}svg .stays{fill:var(--c0)}svg .slot{fill:var(--rule)}
.key.gone::before{background:var(--c1)}.key.stays::before{background:var(--c0)}
svg g circle{fill:currentColor;stroke:var(--card);stroke-width:1.5}
svg g.teacher{color:var(--grey)}svg g.stage{color:var(--blue)}svg g.artifact{color:var(--accent)}
svg.chart text.label{fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round}
svg.chart text.label.artifact{fill:var(--accent);font-weight:700}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.line.c0{stroke:var(--c0);stroke-width:2.2}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;color:var(--soft);margin:2px 0 0;padding-left:8%}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--c5)}
.key.c0::before{background:var(--c0)}.key.c1::before{background:var(--c1)}.key.c2::before{background:var(--c2)}.key.c3::before{background:var(--c3)}.key.c4::before{background:var(--c4)}
table.heat{width:auto;border-spacing:4px;border-collapse:separate}
table.heat th,table.heat td{border:0;text-align:center}
table.heat tbody th{text-align:right}
table.heat td{min-width:74px;border-radius:7px;padding:6px 8px;background:color-mix(in srgb,var(--c1) calc(var(--heat,0%)*.75),var(--rule))}
table.heat td:empty{background:none}
table.heat td b{display:block;font-size:14px}
table.heat td small{color:inherit;opacity:.75;font-size:11px}
details>summary{cursor:pointer;font-weight:600;font-size:14px;padding:4px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:8px 0 0;font-size:13.5px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:12.5px;padding:10px 4px}
@media (max-width:600px){main{padding:16px 10px 40px}section{padding:14px 13px}li .note{margin-left:0}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}details>*{display:block}}
)css";
}

}  // namespace kompakt
