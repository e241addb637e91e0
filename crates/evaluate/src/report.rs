//! Reports of evaluations as JSON, Markdown and charts.

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

/// The measurements of one or several models, with the settings of the evaluation.
///
/// Models and metrics are shown in the order of their first measurements.
///
/// # Examples
/// ```
/// use evaluate::{Bootstrap, Error, Measurement, Report};
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
///
/// assert!(matches!(Report::from_json("{}"), Err(Error::Report { .. })));
/// # Ok::<(), evaluate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The title, one line.
    pub title: String,
    /// The names and values of the settings of the evaluation.
    #[serde(with = "settings")]
    pub settings: Vec<(String, String)>,
    /// The measurements.
    pub measurements: Vec<Measurement>,
}

/// A metric of a model in a protocol.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The protocol, such as `gsm8k, 5 examples`.
    pub protocol: String,
    /// The metric, such as `perplexity`.
    pub metric: String,
    /// The model, such as `4 bits, groups of 32`.
    pub model: String,
    /// The value with its interval and the number of items.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// The kind of the items, such as `windows`.
    pub unit: String,
    /// Whether smaller values are better.
    pub lower_is_better: bool,
}

/// The measurements of a metric in a protocol.
struct Row<'a> {
    protocol: &'a str,
    metric: &'a str,
    unit: &'a str,
    lower_is_better: bool,
    measurements: Vec<&'a Measurement>,
}

impl Row<'_> {
    /// The number and kind of the items; the number may differ between models.
    fn items(&self) -> String {
        let counts = || self.measurements.iter().map(|of| of.estimate.n);
        let (least, most) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
        if least == most {
            format!("{most} {}", self.unit)
        } else {
            format!("{least} to {most} {}", self.unit)
        }
    }
}

impl Report {
    /// A report without settings or measurements.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            settings: Vec::new(),
            measurements: Vec::new(),
        }
    }

    /// Adds a setting, or replaces the value of one with the same name.
    pub fn with_setting(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        let (name, value) = (name.into(), value.to_string());
        match self.settings.iter_mut().find(|(known, _)| *known == name) {
            Some(setting) => setting.1 = value,
            None => self.settings.push((name, value)),
        }
        self
    }

    /// The report as JSON, with a `format_version` and a final line feed.
    ///
    /// `settings` is an object in their order, and has the last of several settings of one name. Each of
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

    /// Reads a report from JSON that [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// [`Error::Report`] for another `format_version`, and for JSON that is not a report.
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
            Some(other) => format!("format_version is {other}, expected {FORMAT_VERSION}"),
            None => "no format_version".into(),
        };
        Err(Error::Report { problem })
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
