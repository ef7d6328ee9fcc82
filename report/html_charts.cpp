// Charts as inline SVG: they need no script, print sharply, follow the colour scheme and are the same bytes everywhere.
#include <algorithm>
#include <array>
#include <cmath>

#include "core/text.h"
#include "report/html.h"
#include "report/metrics.h"

namespace kompakt {
namespace {

constexpr double chart_left = 62, chart_right = 18, chart_top = 16, chart_bottom = 46;

std::string chart_n(double value) { return fixed(value, 1); }

// About `wanted` round steps of 1, 2 or 5 times a power of ten that cover [low, high].
std::vector<double> chart_ticks(double low, double high, int wanted) {
  const double raw = (high - low) / wanted, power = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0}) {
    if (factor * power >= raw) step = factor * power;
  }
  std::vector<double> ticks;
  for (double k = std::ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; ++k) ticks.push_back(k * step + 0.0);  // -0 becomes 0
  return ticks;
}

struct ChartFrame {
  double width = 1040, height = 360;  // a whole row of the page; text keeps its size, so small charts have small frames
  double x_low = 0, x_high = 1, y_low = 0, y_high = 1;
  bool log_x = false;
  double x(double value) const {
    const double share = log_x ? std::log(value / x_low) / std::log(x_high / x_low) : (value - x_low) / (x_high - x_low);
    return chart_left + share * (width - chart_left - chart_right);
  }
  double y(double value) const { return chart_top + (1 - (value - y_low) / (y_high - y_low)) * (height - chart_top - chart_bottom); }
};

std::string chart_open(const ChartFrame& frame, const std::string& title) {
  return str("<svg class=\"chart\" viewBox=\"0 0 ", fixed(frame.width, 0), " ", fixed(frame.height, 0), "\" role=\"img\" aria-label=\"", html_escape(title), "\">\n");
}

std::string chart_text(double x, double y, const char* style, const std::string& text) {
  return str("<text x=\"", chart_n(x), "\" y=\"", chart_n(y), "\" class=\"", style, "\">", html_escape(text), "</text>\n");
}

std::string chart_line(double x1, double y1, double x2, double y2, const char* style) {
  return str("<line x1=\"", chart_n(x1), "\" y1=\"", chart_n(y1), "\" x2=\"", chart_n(x2), "\" y2=\"", chart_n(y2), "\" class=\"", style, "\"/>\n");
}

std::string chart_axes(const ChartFrame& frame, const std::string& x_title, const std::string& y_title) {
  return chart_line(chart_left, frame.height - chart_bottom, frame.width - chart_right, frame.height - chart_bottom, "axis") + chart_text((chart_left + frame.width - chart_right) / 2, frame.height - 8, "title middle", x_title) +
         str("<text transform=\"translate(15 ", chart_n((chart_top + frame.height - chart_bottom) / 2), ") rotate(-90)\" class=\"title middle\">", html_escape(y_title), "</text>\n");
}

std::string chart_x_tick(const ChartFrame& frame, double value, const std::string& text) {
  return chart_line(frame.x(value), chart_top, frame.x(value), frame.height - chart_bottom, "grid") + chart_text(frame.x(value), frame.height - chart_bottom + 17, "tick middle", text);
}

std::string chart_y_tick(const ChartFrame& frame, double value, const std::string& text) {
  return chart_line(chart_left, frame.y(value), frame.width - chart_right, frame.y(value), "grid") + chart_text(chart_left - 7, frame.y(value) + 4, "tick end", text);
}

int chart_digits(const std::vector<double>& ticks) {
  if (ticks.size() < 2) return 2;
  return std::clamp(static_cast<int>(std::ceil(-std::log10(ticks[1] - ticks[0]) - 1e-9)), 0, 9);
}

struct ChartBox {
  double x1, y1, x2, y2;
  bool meets(const ChartBox& o) const { return x1 < o.x2 && o.x1 < x2 && y1 < o.y2 && o.y1 < y2; }
};

// Labels beside their points: the first of eight places that hits no other label, marker or border.
std::string chart_labels(const std::vector<ScatterPoint>& points, const ChartFrame& frame) {
  std::vector<ChartBox> taken;
  for (const ScatterPoint& p : points) taken.push_back({frame.x(p.x) - 7, frame.y(p.high.value_or(p.y)) - 3, frame.x(p.x) + 7, frame.y(p.low.value_or(p.y)) + 3});
  std::string out;
  for (const ScatterPoint& p : points) {
    const double x = frame.x(p.x), y = frame.y(p.y), width = 6.6 * static_cast<double>(text_width(p.label));
    const std::array<std::pair<double, double>, 8> places = {{{x + 11, y + 4}, {x - 11 - width, y + 4}, {x + 11, y - 12}, {x + 11, y + 20}, {x - 11 - width, y - 12}, {x - 11 - width, y + 20}, {x - width / 2, frame.y(p.high.value_or(p.y)) - 9}, {x - width / 2, frame.y(p.low.value_or(p.y)) + 18}}};
    std::size_t best = 0;
    for (std::size_t i = 0; i < places.size(); ++i) {
      const ChartBox box = {places[i].first, places[i].second - 11, places[i].first + width, places[i].second + 3};
      const bool inside = box.x1 >= chart_left && box.x2 <= frame.width - 2 && box.y1 >= 2 && box.y2 <= frame.height - chart_bottom;
      if (!inside || std::any_of(taken.begin(), taken.end(), [&](const ChartBox& o) { return o.meets(box); })) continue;
      best = i;
      break;
    }
    taken.push_back({places[best].first, places[best].second - 11, places[best].first + width, places[best].second + 3});
    out += str("<text x=\"", chart_n(places[best].first), "\" y=\"", chart_n(places[best].second), "\" class=\"label ", p.kind, "\">", html_escape(p.label), "</text>\n");
  }
  return out;
}

}  // namespace

std::string svg_scatter(const std::vector<ScatterPoint>& points, const std::string& x_title, const std::string& y_title, bool share, const std::vector<ScatterPoint>& cloud) {
  if (points.empty()) return {};
  ChartFrame frame;
  frame.log_x = true;
  frame.x_low = frame.x_high = points[0].x;
  frame.y_low = frame.y_high = points[0].y;
  for (const auto* list : {&points, &cloud})
    for (const ScatterPoint& p : *list) {
      frame.x_low = std::min(frame.x_low, p.x);
      frame.x_high = std::max(frame.x_high, p.x);
      frame.y_low = std::min(frame.y_low, p.low.value_or(p.y));
      frame.y_high = std::max(frame.y_high, p.high.value_or(p.y));
    }
  frame.x_low /= 1.6;
  frame.x_high *= 1.6;
  const double room = std::max((frame.y_high - frame.y_low) * 0.15, std::max(std::abs(frame.y_high), 1e-9) * 0.004);
  frame.y_low -= room;
  frame.y_high = share ? std::min(1.0 + room / 4, frame.y_high + room) : frame.y_high + room;
  std::string svg = chart_open(frame, str(y_title, " against ", x_title));
  const auto y_ticks = chart_ticks(frame.y_low, frame.y_high, 6);
  for (const double tick : y_ticks) {
    if (share && tick > 1) continue;
    svg += chart_y_tick(frame, tick, share ? str(fixed(100 * tick, std::max(0, chart_digits(y_ticks) - 2)), "%") : fixed(tick, chart_digits(y_ticks)));
  }
  const bool wide = frame.x_high / frame.x_low > 200;
  for (double power = std::pow(10, std::floor(std::log10(frame.x_low))); power <= frame.x_high; power *= 10) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * power;
      if (tick < frame.x_low || tick > frame.x_high || (wide && factor != 1)) continue;
      svg += chart_x_tick(frame, tick, replace_all(replace_all(human_bytes(tick), ".00", ""), ".0", ""));
    }
  }
  svg += chart_axes(frame, x_title, y_title);
  std::string path;
  for (const ScatterPoint& p : points) path += str(path.empty() ? "M" : " L", chart_n(frame.x(p.x)), " ", chart_n(frame.y(p.y)));
  svg += str("<path d=\"", path, "\" class=\"trail\"/>\n");
  for (const ScatterPoint& p : cloud)
    svg += str("<circle cx=\"", chart_n(frame.x(p.x)), "\" cy=\"", chart_n(frame.y(p.y)), "\" r=\"3\" class=\"cloud\"><title>", html_escape(str(p.label, ": ", human_bytes(p.x), ", ", show_number(Unit::small_number, p.y))), "</title></circle>\n");
  for (const ScatterPoint& p : points) {
    const double x = frame.x(p.x);
    svg += str("<g class=\"", p.kind, "\"><title>", html_escape(str(p.label, ": ", human_bytes(p.x), ", ", share ? show_number(Unit::share, p.y) : show_number(Unit::number, p.y))), "</title>\n");
    if (p.low && p.high) {
      svg += chart_line(x, frame.y(*p.low), x, frame.y(*p.high), "whisker");
      for (const double end : {*p.low, *p.high}) svg += chart_line(x - 4, frame.y(end), x + 4, frame.y(end), "whisker");
    }
    svg += str("<circle cx=\"", chart_n(x), "\" cy=\"", chart_n(frame.y(p.y)), "\" r=\"6\"/></g>\n");
  }
  return svg + chart_labels(points, frame) + "</svg>\n";
}

std::string svg_lines(const std::vector<Series>& series, const std::string& x_title, const std::string& y_title) {
  constexpr std::size_t most = 400;
  std::vector<Series> drawn;
  for (const Series& s : series) {
    Series line = {s.label, {}};
    const std::size_t group = (s.points.size() + most - 1) / most;
    for (std::size_t i = 0; i < s.points.size(); i += group) {
      double x = 0, y = 0, n = 0;
      for (std::size_t j = i; j < std::min(i + group, s.points.size()); ++j) {
        if (!std::isfinite(s.points[j].first) || !std::isfinite(s.points[j].second)) continue;
        x += s.points[j].first;
        y += s.points[j].second;
        ++n;
      }
      if (n > 0) line.points.emplace_back(x / n, y / n);
    }
    if (!line.points.empty()) drawn.push_back(line);
  }
  if (drawn.empty()) return {};
  ChartFrame frame;
  frame.width = 540;
  frame.height = 300;
  frame.x_low = frame.x_high = drawn[0].points[0].first;
  frame.y_high = drawn[0].points[0].second;
  frame.y_low = std::min(0.0, frame.y_high);
  for (const Series& s : drawn) {
    for (const auto& [x, y] : s.points) {
      frame.x_low = std::min(frame.x_low, x);
      frame.x_high = std::max(frame.x_high, x);
      frame.y_low = std::min(frame.y_low, y);
      frame.y_high = std::max(frame.y_high, y);
    }
  }
  if (frame.x_high <= frame.x_low) frame.x_high = frame.x_low + 1;
  frame.y_high = frame.y_high > frame.y_low ? frame.y_low + (frame.y_high - frame.y_low) * 1.05 : frame.y_low + 1;
  std::string svg = chart_open(frame, str(y_title, " over ", x_title));
  const auto y_ticks = chart_ticks(frame.y_low, frame.y_high, 5), x_ticks = chart_ticks(frame.x_low, frame.x_high, 7);
  for (const double tick : y_ticks) svg += chart_y_tick(frame, tick, fixed(tick, chart_digits(y_ticks)));
  for (const double tick : x_ticks) svg += chart_x_tick(frame, tick, fixed(tick, chart_digits(x_ticks)));
  svg += chart_axes(frame, x_title, y_title);
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    std::string path;
    for (const auto& [x, y] : drawn[i].points) path += str(path.empty() ? "M" : " L", chart_n(frame.x(x)), " ", chart_n(frame.y(y)));
    if (drawn[i].points.size() == 1) path += " h2";
    svg += str("<path d=\"", path, "\" class=\"line c", i % 6, "\"><title>", html_escape(drawn[i].label), "</title></path>\n");
  }
  // The legend stands below the chart as HTML, where long names wrap.
  std::string legend;
  for (std::size_t i = 0; i < drawn.size(); ++i) legend += str("<span class=\"key c", i % 6, "\">", html_escape(drawn[i].label), "</span>");
  return svg + "</svg>\n<p class=\"legend\">" + legend + "</p>\n";
}

}  // namespace kompakt
