//! What an evaluation found, as JSON, as Markdown and as a chart.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::statistics::Estimate;
use crate::{Error, Result};

mod axis;
mod chart;
mod label;
mod markdown;
mod settings;

#[cfg(test)]
mod tests;

/// The `format_version` of [`Report::to_json`].
pub const FORMAT_VERSION: u64 = 1;

/// The measurements of one evaluation, of one model or of several, and how they were made.
///
/// Models, and protocols with their metrics, come in the order in which they first appear.
///
/// ```
/// use evaluate::{Bootstrap, Measurement, Report};
///
/// let mut report = Report::new("Held-out text").with_setting("seed", 0);
/// let nll = Bootstrap::new().mean(&[1.2, 1.4, 1.1])?;
/// report.measurements.push(Measurement {
///     protocol: "gptq".into(),
///     metric: "perplexity".into(),
///     model: "4 bits".into(),
///     estimate: nll.map(f64::exp),
///     unit: "windows".into(),
///     lower_is_better: true,
/// });
/// assert!(report.to_markdown().contains("| gptq     | perplexity ↓ | 3 windows |"));
/// assert_eq!(Report::from_json(&report.to_json())?, report);
/// # Ok::<(), evaluate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What it is about, in one line.
    pub title: String,
    /// What the measurements depend on, name and value, in the order in which they are shown.
    #[serde(with = "settings")]
    pub settings: Vec<(String, String)>,
    /// What was measured.
    pub measurements: Vec<Measurement>,
}

/// One metric of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// How it was measured, such as `gsm8k, 5 examples`.
    pub protocol: String,
    /// What was measured, such as `perplexity`.
    pub metric: String,
    /// The model, such as `4 bits, groups of 32`.
    pub model: String,
    /// The value with its interval, and the number of items that it is of.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// What the items are, such as `windows`.
    pub unit: String,
    /// Whether a smaller value is a better one.
    pub lower_is_better: bool,
}

/// A metric of a protocol, with its measurements.
struct Row<'a> {
    protocol: &'a str,
    metric: &'a str,
    unit: &'a str,
    lower_is_better: bool,
    measurements: Vec<&'a Measurement>,
}

impl Row<'_> {
    /// What the items are and how many, which may differ between models.
    fn items(&self) -> String {
        let counts = || self.measurements.iter().map(|of| of.estimate.n);
        let (least, most) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
        match least == most {
            true => format!("{most} {}", self.unit),
            false => format!("{least} to {most} {}", self.unit),
        }
    }
}

impl Report {
    /// A report without settings and measurements.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            settings: Vec::new(),
            measurements: Vec::new(),
        }
    }

    /// Adds a setting, or gives one of that name another value.
    pub fn with_setting(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        let (name, value) = (name.into(), value.to_string());
        match self.settings.iter_mut().find(|(known, _)| *known == name) {
            Some(setting) => setting.1 = value,
            None => self.settings.push((name, value)),
        }
        self
    }

    /// The report as JSON, with a `format_version` and a newline at the end.
    ///
    /// `settings` is an object in their order, of two of one name with the later one; each of
    /// `measurements` is an object with the fields of a [`Measurement`] and of its [`Estimate`].
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct File<'a> {
            format_version: u64,
            #[serde(flatten)]
            report: &'a Report,
        }
        let file = File {
            format_version: FORMAT_VERSION,
            report: self,
        };
        serde_json::to_string_pretty(&file).expect("strings and numbers") + "\n"
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// [`Error::Report`] for another `format_version`, or for what is no report.
    pub fn from_json(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format_version: Option<Value>,
        }
        let error = |error: serde_json::Error| Error::Report {
            problem: error.to_string(),
        };
        let version: Version = serde_json::from_str(json).map_err(error)?;
        let problem = match version.format_version {
            Some(version) if version == FORMAT_VERSION => {
                return serde_json::from_str(json).map_err(error);
            }
            Some(other) => format!("its format_version is {other}, known is {FORMAT_VERSION}"),
            None => "it has no format_version".into(),
        };
        Err(Error::Report { problem })
    }

    /// The report as Markdown: title, settings, and a table with a column for each model.
    ///
    /// A cell is a value and its interval, with as many digits as the interval leaves sensible; one
    /// item alone has no interval. Whatever the names are, the table stays one.
    pub fn to_markdown(&self) -> String {
        markdown::markdown(self)
    }

    /// The report as a chart in SVG: a panel for each metric, a point and an interval for each model.
    ///
    /// An axis is logarithmic where the values span more than a factor of 30.
    pub fn to_svg(&self) -> String {
        chart::svg(self)
    }

    fn models(&self) -> Vec<&str> {
        let mut models = Vec::new();
        for measurement in &self.measurements {
            if !models.contains(&&*measurement.model) {
                models.push(&*measurement.model);
            }
        }
        models
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for of in &self.measurements {
            let same = |row: &&mut Row<'_>| {
                row.protocol == of.protocol
                    && row.metric == of.metric
                    && row.unit == of.unit
                    && row.lower_is_better == of.lower_is_better
            };
            match rows.iter_mut().find(same) {
                Some(row) => row.measurements.push(of),
                None => rows.push(Row {
                    protocol: &of.protocol,
                    metric: &of.metric,
                    unit: &of.unit,
                    lower_is_better: of.lower_is_better,
                    measurements: vec![of],
                }),
            }
        }
        rows
    }
}
