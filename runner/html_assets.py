"""What the report's page is dressed in: one style sheet, one script. Nothing is loaded from anywhere."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--paper:#fbfaf6;--card:#fffefb;--ink:#1e2023;--soft:#565a60;--rule:#dad5c9;--strong:#8d887c;
--accent:#1f4f7d;--good:#1a6547;--good-bg:#e3efe6;--bad:#97331f;--bad-bg:#f6e4de;--open:#6b5410;--open-bg:#f2ead0;
--s0:#2b6391;--s1:#bd4e24;--s2:#2f7855;--s3:#7a5496;--s4:#8f680a;--s5:#5c6066;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua","URW Palladio L",Georgia,"DejaVu Serif",serif;
--math:"STIX Two Math","Cambria Math","Latin Modern Math","STIX Two Text",Cambria,Georgia,"Liberation Serif",serif;
--sans:system-ui,-apple-system,"Segoe UI","Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;
--mono:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--card:#1a1d20;--ink:#e7e4dc;--soft:#a6a8a8;--rule:#33373c;
--strong:#6c7076;--accent:#8fbbe3;--good:#86cda6;--good-bg:#1b3327;--bad:#eda08c;--bad-bg:#3d211b;--open:#dcc377;
--open-bg:#352d15;--s0:#77b0de;--s1:#ee8f66;--s2:#74c19a;--s3:#bd9bd6;--s4:#d9b250;--s5:#a6a8a8}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 var(--sans);overflow-wrap:break-word}
body>header,main,body>footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
body>header{padding-top:2.5rem}
body>footer{padding-top:1rem;padding-bottom:3rem;color:var(--soft);font-size:.875rem}
h1,h2,h3,h4{font-family:var(--serif);font-weight:600;line-height:1.2;text-wrap:balance;margin:0}
h1{font-size:2.25rem;letter-spacing:-.01em}
h2{font-size:1.6rem;margin:3.5rem 0 1rem;padding-top:.9rem;border-top:2px solid var(--ink)}
h3{font-size:1.3rem;margin:0 0 .35rem}
h4{font-size:1.08rem;line-height:1.35;margin:0 0 .5rem}
p{margin:.5rem 0;max-width:44rem}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem}
.lead{font-family:var(--serif);font-size:1.15rem;color:var(--soft)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;padding:0;margin:1.25rem 0 0;font-size:.95rem}
code,pre,.mono{font-family:var(--mono);font-size:.875em}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);padding:.6rem .8rem;margin:.5rem 0;border-radius:3px}
.quiet,figcaption,caption,.meta{color:var(--soft)}
.meta{font-size:.9rem;margin:.15rem 0 .6rem}
.meta>span:not(:last-child)::after{content:"\\00b7";margin:0 .45em;color:var(--strong)}
.scroll{overflow-x:auto;margin:.75rem 0 1.25rem}
table{border-collapse:collapse;font-size:.9rem;line-height:1.4;min-width:100%;border-top:1.5px solid var(--ink);
border-bottom:1.5px solid var(--ink);font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:.875rem;padding:0 0 .4rem;max-width:min(44rem,calc(100vw - 3.5rem))}
th,td{text-align:left;vertical-align:top;padding:.38rem 1.1rem .38rem 0;overflow-wrap:normal}
th:last-child,td:last-child{padding-right:.25rem}
thead th{font-weight:600;border-bottom:1px solid var(--strong);vertical-align:bottom;white-space:nowrap}
tbody th{font-weight:500}
tbody tr+tr>*{border-top:1px solid var(--rule)}
tfoot>tr>*{border-top:1px solid var(--strong);font-weight:600}
.n{text-align:right;white-space:nowrap}
td.wide{min-width:14rem}
.name{white-space:nowrap}
th button{font:inherit;color:inherit;background:none;border:0;padding:.1rem 0;margin:0;cursor:pointer}
th button::after{content:"\\2195";color:var(--strong);margin-left:.35em;font-size:.85em}
th[aria-sort=ascending] button::after{content:"\\2191";color:var(--accent)}
th[aria-sort=descending] button::after{content:"\\2193";color:var(--accent)}
.search{display:flex;flex-wrap:wrap;gap:.35rem 1rem;align-items:baseline;margin:1rem 0}
.search[hidden]{display:none}
.search input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--strong);border-radius:3px;
padding:.4rem .6rem;width:min(100%,22rem)}
.badge{display:inline-block;font:600 .8rem/1.3 var(--sans);padding:.12em .6em;border-radius:1em;white-space:nowrap;
color:var(--open);background:var(--open-bg)}
a.badge{text-decoration:none}
a.badge:hover{text-decoration:underline}
.badge.supported{color:var(--good);background:var(--good-bg)}
.badge.not,.badge.failed{color:var(--bad);background:var(--bad-bg)}
.badge.none{color:var(--soft);background:none;padding-left:0;font-weight:400}
.method{margin:0 0 3rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
h2+.method,.family+.method{border-top:0;padding-top:0}
.method h3 code{font-size:.82em;font-weight:400;color:var(--soft);margin-left:.4em;white-space:nowrap}
.formula{font-family:var(--math);font-size:1.2rem;line-height:1.75;margin:.9rem 0;padding:.25rem 0 .25rem 1.1rem;
border-left:3px solid var(--rule);overflow-x:auto}
.formula span{display:block;white-space:nowrap}
.formula i{font-style:italic;padding-right:.04em}
.formula sub,.formula sup{font-size:.7em;line-height:0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1.25rem;margin:.75rem 0;font-size:.95rem}
dt{color:var(--soft)}dd{margin:0}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent);padding:.15rem 0;width:max-content;max-width:100%}
.claim{background:var(--card);border:1px solid var(--rule);border-radius:4px;padding:1.1rem 1.25rem .6rem;margin:1.25rem 0}
.warn{border-left:3px solid var(--open);padding:.1rem 0 .1rem .8rem;margin:.75rem 0;font-size:.92rem;list-style:none}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.25rem 2.5rem;margin:1.1rem 0}
.charts figure+figure{margin-top:1rem}.charts>figure+figure{margin-top:0}
figure{margin:0;min-width:0;max-width:33rem}
figcaption{font-size:.85rem;line-height:1.4;margin:0 0 .35rem}
figcaption b{color:var(--ink);font-weight:600}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px var(--sans);fill:var(--soft);font-variant-numeric:tabular-nums}
svg .label{fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--strong);stroke-width:1}
.zero{stroke:var(--ink);stroke-width:1}.margin{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:5 3}
.reference{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.beyond{fill:var(--good);opacity:.09}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.band{opacity:.15;stroke:none}
.ci{stroke-width:2.2}.dot{fill:none;stroke-width:1.2;opacity:.75}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding:0;margin:.35rem 0 0;font-size:.82rem}
.legend svg{display:inline-block;width:1.8em;height:.7em;vertical-align:baseline;margin-right:.4em}
""" + "".join(
    f".c{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(6)) + """
.c1{stroke-dasharray:7 3}.c2{stroke-dasharray:2 2.5}.c3{stroke-dasharray:9 3 2 3}.c4{stroke-dasharray:4 2}
.c5{stroke-dasharray:12 4}.ci,.dot{stroke-dasharray:none}
@media (max-width:40rem){body>header,main,body>footer{padding-left:1rem;padding-right:1rem}body>header{padding-top:1.5rem}
h1{font-size:1.75rem}h2{font-size:1.4rem;margin-top:2.75rem}dl{grid-template-columns:minmax(0,1fr);gap:0}
dd{margin-bottom:.5rem}.claim{margin-left:-.5rem;margin-right:-.5rem;padding:.9rem .8rem .5rem}.formula{font-size:1.08rem}
th,td{padding-right:.9rem}.method h3 code{margin-left:0}}
.gallery{display:flex;flex-wrap:wrap;gap:.8rem;margin:.6rem 0}
.picture{max-width:16rem}.picture img{max-width:100%;height:auto;image-rendering:pixelated}.picture figcaption{font-size:.8rem}
@media print{:root{--paper:#fff;--card:#fff}.search{display:none}.claim,figure,tr{break-inside:avoid}
.scroll,pre,.formula{overflow:visible}}
"""

# Search and sort. Without a script the table stands as it is; the buttons and the search box are made here.
JS = """
(function(){
"use strict";
var plain=function(s){return s.normalize("NFKD").replace(/[\\u0300-\\u036f]/g,"").toLowerCase()};
document.querySelectorAll("table[data-sortable]").forEach(function(table){
  var body=table.tBodies[0],heads=[].slice.call(table.tHead.rows[0].cells);
  heads.forEach(function(head,column){
    var button=document.createElement("button");
    button.type="button";
    button.append.apply(button,[].slice.call(head.childNodes));
    head.append(button);
    button.addEventListener("click",function(){
      var down=head.getAttribute("aria-sort")==="ascending",sign=down?-1:1;
      heads.forEach(function(other){other.removeAttribute("aria-sort")});
      head.setAttribute("aria-sort",down?"descending":"ascending");
      var key=function(row){var c=row.cells[column],v=c.getAttribute("data-v");return v===null?plain(c.textContent.trim()):v};
      var rows=[].slice.call(body.rows).map(function(row,i){return{row:row,key:key(row),i:i}});
      rows.sort(function(a,b){
        if(a.key===b.key)return a.i-b.i;
        if(a.key===""||b.key==="")return a.key===""?1:-1;
        return sign*a.key.localeCompare(b.key,"en",{numeric:true})});
      rows.forEach(function(r){body.append(r.row)});
    });
  });
});
document.querySelectorAll("form.search").forEach(function(form){
  var input=form.querySelector("input"),told=form.querySelector("output");
  var table=document.getElementById(input.getAttribute("aria-controls"));
  var rows=[].slice.call(table.tBodies[0].rows);
  var texts=rows.map(function(row){return plain(row.textContent)});
  var search=function(){
    var words=plain(input.value).split(/\\s+/).filter(Boolean),shown=0;
    rows.forEach(function(row,i){
      var fits=words.every(function(w){return texts[i].indexOf(w)>=0});
      row.hidden=!fits;
      shown+=fits});
    told.textContent=words.length?shown+" of "+rows.length:"";
  };
  form.hidden=false;
  form.addEventListener("submit",function(event){event.preventDefault()});
  input.addEventListener("input",search);
});
})();
"""
