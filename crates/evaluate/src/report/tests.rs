use proptest::prelude::*;

use super::*;

fn estimate(value: f64, lower: f64, upper: f64, n: usize) -> Estimate {
    Estimate {
        value,
        lower,
        upper,
        n,
    }
}

fn measurement(protocol: &str, metric: &str, model: &str, estimate: Estimate) -> Measurement {
    Measurement {
        protocol: protocol.into(),
        metric: metric.into(),
        model: model.into(),
        estimate,
        unit: "windows".into(),
        lower_is_better: metric == "perplexity",
    }
}

fn two_models() -> Report {
    let mut report = Report::new("Llama")
        .with_setting("seed", 7)
        .with_setting("bits", 4);
    report.measurements = vec![
        measurement(
            "gptq",
            "perplexity",
            "bf16",
            estimate(5.4721, 5.38, 5.57, 341),
        ),
        measurement("arc", "acc", "bf16", estimate(0.5, 0.42, 0.58, 200)),
        measurement(
            "gptq",
            "perplexity",
            "4 bits",
            estimate(15.6, 15.0, 16.3, 341),
        ),
    ];
    report
}

/// The texts of an SVG, checked for closed tags and known entities.
fn texts(svg: &str) -> Vec<String> {
    let (mut open, mut texts, mut rest) = (Vec::new(), Vec::new(), svg);
    while let Some(at) = rest.find('<') {
        let text = rest[..at].trim();
        assert!(!text.contains('>'), "{text}");
        if !text.is_empty() {
            texts.push(text.to_string());
        }
        let end = at + rest[at..].find('>').expect("a tag has an end");
        let tag = &rest[at + 1..end];
        assert!(
            !tag.contains('<') && tag.matches('"').count() % 2 == 0,
            "{tag}"
        );
        let name = tag.split([' ', '\n']).next().unwrap();
        match name.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') => {}
            None => open.push(name),
        }
        rest = &rest[end + 1..];
    }
    assert_eq!(open, [""; 0]);
    for entity in svg.split('&').skip(1) {
        let known = ["lt;", "gt;", "amp;", "quot;", "apos;"];
        assert!(
            known.iter().any(|known| entity.starts_with(known)),
            "{entity}"
        );
    }
    assert!(svg.chars().all(|c| c == '\n' || !c.is_control()));
    texts
}

#[test]
fn markdown_is_one_aligned_table() {
    let expected = "\
# Llama

* seed: 7
* bits: 4

| protocol | metric       |       items |                 bf16 |                  4 bits |
| -------- | ------------ | ----------: | -------------------: | ----------------------: |
| gptq     | perplexity ↓ | 341 windows | 5.472 [5.380, 5.570] | 15.600 [15.000, 16.300] |
| arc      | acc ↑        | 200 windows | 0.500 [0.420, 0.580] |                       - |

↓: lower is better, ↑: higher is better. In brackets: the confidence interval.
";
    // 15.6 has the decimals of 5.4721: both are of one metric.
    assert_eq!(two_models().to_markdown(), expected);
}

#[test]
fn a_report_without_measurements_has_no_table() {
    let report = Report::new("Nothing\nyet");
    assert_eq!(report.to_markdown(), "# Nothing yet\n");
    assert_eq!(texts(&report.to_svg()), ["Nothing yet", "no measurements"]);
}

/// In a terminal nothing is escaped, and what would move its cursor is left out.
#[test]
fn a_terminal_shows_names_as_they_are() {
    let report = two_models().with_setting("separator", "<|end_of_text|> & \u{1b}[2J*");
    let (plain, markdown) = (report.to_string(), report.to_markdown());
    let line = "* separator: <|end_of_text|> & [2J*\n";
    assert!(plain.contains(line), "{plain}");
    assert!(
        markdown.contains("* separator: &lt;\\|end_of_text\\|> &amp;"),
        "{markdown}"
    );
    let report = two_models();
    assert_eq!(report.to_string(), report.to_markdown());
}

#[test]
fn names_do_not_break_the_table() {
    let mut report = two_models();
    let names = [
        "a|b",
        r"c\|d",
        "<b>e</b>",
        "f\ng",
        "*h* `i` [j](k)",
        "q_proj _l_ &lt;",
        "\u{1b}[m",
    ];
    for name in names {
        report.title = name.into();
        report.settings = vec![(name.into(), name.into())];
        report.measurements[2].model = name.into();
        report.measurements[1].protocol = name.into();
        let text = report.to_markdown();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 10, "{text}");
        for line in &lines[4..8] {
            // A border is a bar after an even number of backslashes.
            let mut escaped = false;
            let borders = line.chars().filter(|&c| {
                let border = c == '|' && !escaped;
                escaped = c == '\\' && !escaped;
                border
            });
            assert_eq!(borders.count(), 6, "{line}");
            assert_eq!(line.chars().count(), lines[4].chars().count());
        }
        assert!(!text.contains("<b>") && !text.contains('\u{1b}'));
    }
    assert!(report.to_markdown().contains(r"\[m"));
    report.title = names[5].into();
    assert!(
        report
            .to_markdown()
            .starts_with("# q_proj \\_l\\_ &amp;lt;\n")
    );
}

#[test]
fn repeated_measurements_are_all_shown() {
    let mut report = two_models();
    let again = measurement("arc", "acc", "bf16", estimate(0.25, 0.25, 0.25, 1));
    report.measurements.push(again);
    let text = report.to_markdown();
    assert!(text.contains("0.5000 [0.4200, 0.5800] / 0.2500"), "{text}");
    assert!(text.contains("1 to 200 windows"), "{text}");
    assert_eq!(report.to_svg().matches("<circle").count(), 4);
}

#[test]
fn json_has_a_version_and_is_read_back() {
    let mut report = two_models();
    report.measurements[0].estimate.value = 0.1 + 0.2;
    let json = report.to_json();
    let expected = r#"{
  "format_version": 1,
  "title": "Llama",
  "settings": {
    "seed": "7",
    "bits": "4"
  },
  "measurements": [
    {
      "protocol": "gptq",
      "metric": "perplexity",
      "model": "bf16",
      "value": 0.30000000000000004,
      "lower": 5.38,
      "upper": 5.57,
      "n": 341,
      "unit": "windows",
      "lower_is_better": true
    },"#;
    assert!(json.starts_with(expected), "{json}");
    assert_eq!(Report::from_json(&json).unwrap(), report);

    report.measurements[0].estimate.upper = f64::INFINITY;
    let read = Report::from_json(&report.to_json()).unwrap();
    assert!(read.measurements[0].estimate.upper.is_nan());

    let problem = |json: &str| Report::from_json(json).unwrap_err().to_string();
    let newer = json.replace("\"format_version\": 1", "\"format_version\": 2");
    assert_eq!(
        problem(&newer),
        "not a report: format_version is 2, expected 1"
    );
    assert_eq!(problem("{}"), "not a report: no format_version");
    assert!(problem(r#"{"format_version": 1}"#).contains("missing field"));
    assert!(problem("[").starts_with("not a report: EOF"));
}

#[test]
fn a_setting_has_one_value() {
    let report = Report::new("")
        .with_setting("a", 1)
        .with_setting("b", 2)
        .with_setting("a", 3);
    let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
    assert_eq!(report.settings, [pair("a", "3"), pair("b", "2")]);
    let mut twice = Report::new("");
    twice.settings = vec![pair("a", "1"), pair("b", "2"), pair("a", "3")];
    let read = Report::from_json(&twice.to_json()).unwrap();
    assert_eq!(read.settings, [pair("b", "2"), pair("a", "3")]);
}

#[test]
fn a_chart_has_a_point_and_a_whisker_for_each_measurement() {
    let svg = two_models().to_svg();
    assert_eq!(svg.matches("<circle").count(), 3);
    let texts = texts(&svg);
    for expected in [
        "Llama",
        "gptq",
        "341 windows",
        "perplexity (lower is better)",
        "4 bits",
    ] {
        assert!(
            texts.iter().any(|text| text == expected),
            "{expected} in {texts:?}"
        );
    }
    assert!(texts.iter().any(|text| text == "acc (higher is better)"));
    // A whisker has three strokes of two pixels.
    assert_eq!(svg.matches("stroke-width=\"2\"").count(), 9);

    let mut report = two_models();
    report.measurements[0].estimate = estimate(f64::NAN, f64::NAN, f64::NAN, 9);
    report.measurements[1].estimate.n = 1;
    let svg = report.to_svg();
    let whiskers = svg.matches("stroke-width=\"2\"").count() / 3;
    assert_eq!((svg.matches("<circle").count(), whiskers), (2, 1));
}

#[test]
fn names_do_not_break_the_chart() {
    let mut report = two_models();
    for name in [
        "<b>&amp;\"'",
        "]]>",
        "a\nb\0c\u{1b}",
        "\u{fffe}",
        "&",
        "",
        "…".repeat(400).as_str(),
    ] {
        report.title = name.into();
        for measurement in &mut report.measurements {
            measurement.protocol = name.into();
            measurement.metric = name.into();
            measurement.model = name.into();
            measurement.unit = name.into();
        }
        texts(&report.to_svg());
    }
    report.title = "<b> & \"c\"".into();
    assert_eq!(
        texts(&report.to_svg())[0].replace("&quot;", "\""),
        "&lt;b&gt; &amp; \"c\""
    );
}

#[test]
fn a_wide_range_is_logarithmic() {
    let mut report = two_models();
    assert!(!report.to_svg().contains("log scale"));
    report.measurements[2].estimate = estimate(4000.0, 3500.0, 4600.0, 341);
    assert!(
        report
            .to_svg()
            .contains("perplexity (lower is better, log scale)")
    );
}

proptest! {
    #[test]
    fn any_report_is_drawn(
        name in any::<String>(), value: f64, lower: f64, upper: f64, n in 0usize..3, rows in 1usize..15,
    ) {
        let mut report = Report::new(name.as_str()).with_setting(name.as_str(), &name);
        for row in 0..rows {
            let metric = (row / 2).to_string();
            report.measurements.push(measurement(&name, &metric, &name, estimate(value, lower, upper, n)));
        }
        texts(&report.to_svg());
        prop_assert_eq!(report.to_markdown().lines().count(), 8 + rows.div_ceil(2));
        prop_assert!(Report::from_json(&report.to_json()).is_ok());
    }
}

/// `format!` pads to at most 65,535 characters.
#[test]
fn names_may_be_of_any_length() {
    let long = "name ".repeat(14_000);
    let mut report = two_models();
    report.title = long.clone();
    for of in &mut report.measurements[1..] {
        of.protocol = long.clone();
        of.metric = long.clone();
        of.model = long.clone();
        of.unit = long.clone();
    }
    let markdown = report.to_markdown();
    assert!(markdown.contains(long.trim()));
    // One long name does not widen the cells of others.
    let short = markdown.lines().find(|line| line.starts_with("| gptq "));
    assert!(short.is_some_and(|line| line.len() < 1000), "{short:?}");
    assert!(report.to_svg().len() < 100_000);
    assert_eq!(Report::from_json(&report.to_json()).unwrap(), report);
}
