//! What a training is, so that it is resumed with the same and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use quant_core::arithmetic;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::parameters::Parameters;
use crate::evaluation::EvaluationSchedule;
use crate::{Batch, Blocks, Checkpoints, Fingerprint, FitConfig, Weight};

/// The settings that change no bit of the result.
const WITHOUT_EFFECT: [&str; 3] = ["checkpoint_blocks", "epochs", "steps"];

/// All that a result depends on, but for the loss of [`fit_with`](crate::fit_with), which is code.
#[derive(Serialize, Deserialize)]
pub(super) struct Identity {
    version: String,
    base: Fingerprint,
    /// The settings of each layer's adapter.
    adapters: BTreeMap<String, Map<String, Value>>,
    /// The dimensions of the parameters that train.
    parameters: BTreeMap<String, Vec<usize>>,
    data: Data,
    held_out: Option<HeldOut>,
    settings: Map<String, Value>,
}

/// The batches of a training.
#[derive(PartialEq, Serialize, Deserialize)]
struct Data {
    n_batches: usize,
    sha256: String,
}

/// The evaluation on the way.
#[derive(PartialEq, Serialize, Deserialize)]
struct HeldOut {
    data: Data,
    schedule: EvaluationSchedule,
}

impl Data {
    fn of(batches: &[Batch]) -> Self {
        let mut sha256 = Sha256::new();
        for batch in batches {
            sha256.update(batch.sha256());
        }
        let hex = sha256.finalize().into_iter();
        Self {
            n_batches: batches.len(),
            sha256: hex.map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} batches with the SHA-256 {}",
            self.n_batches, self.sha256
        )
    }
}

impl Identity {
    /// That of the training of `n_steps` of a model as it is before the first step.
    pub(super) fn of<M: Blocks>(
        model: &M,
        parameters: &Parameters,
        batches: &[Batch],
        config: &FitConfig,
        n_steps: usize,
        n_members: usize,
    ) -> Self {
        let adapters = model.linears().into_iter().filter_map(|(path, linear)| {
            let adapter = linear.adapter.as_ref()?;
            Some((path, object(&adapter.ops().settings())))
        });
        let mut settings = object(config);
        settings.retain(|name, _| !WITHOUT_EFFECT.contains(&name.as_str()));
        settings.insert("steps".into(), n_steps.into());
        settings.insert("members".into(), n_members.into());
        settings.extend(computation(model, batches));
        let parameters = parameters.0.iter();
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            base: Fingerprint::of(model),
            adapters: adapters.collect(),
            parameters: parameters
                .map(|(path, trained)| (path.clone(), trained.dims.clone()))
                .collect(),
            data: Data::of(batches),
            held_out: config.evaluation.as_ref().map(|evaluation| HeldOut {
                data: Data::of(evaluation.batches()),
                schedule: evaluation.schedule,
            }),
            settings,
        }
    }

    /// The SHA-256 of all of it, and of when checkpoints are written.
    pub(super) fn sha256(&self, checkpoints: Option<&Checkpoints>) -> [u8; 32] {
        let text = serde_json::to_vec(self).expect("numbers and text");
        let saves = checkpoints.map(|of| (of.every, of.resume));
        Sha256::new()
            .chain_update(text)
            .chain_update(format!("{saves:?}"))
            .finalize()
            .into()
    }

    /// In what `found` is another training than this one, in words.
    pub(super) fn differences(&self, found: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.version != found.version {
            let (was, is) = (&self.version, &found.version);
            differences.push(format!("the version of the program was {was}, is {is}"));
        }
        let base = self.base.differences(&found.base).into_iter();
        differences.extend(base.map(|difference| format!("of the base {difference}")));
        let none = Map::new();
        let paths: BTreeSet<&String> = self.adapters.keys().chain(found.adapters.keys()).collect();
        let of_adapters = paths.into_iter().find_map(|path| {
            let [was, is] = [self, found].map(|of| of.adapters.get(path).unwrap_or(&none));
            let first = changes(was, is).next()?;
            Some(format!("of the adapter of layer `{path}` {first}"))
        });
        differences.extend(of_adapters);
        let paths: BTreeSet<&String> = (self.parameters.keys())
            .chain(found.parameters.keys())
            .collect();
        let of_parameters = paths.into_iter().find_map(|path| {
            let [was, is] = [self, found].map(|of| match of.parameters.get(path) {
                Some(dims) => format!("{dims:?}"),
                None => "not trained".into(),
            });
            (was != is).then(|| format!("the parameter `{path}` was {was}, is {is}"))
        });
        differences.extend(of_parameters);
        if self.data != found.data {
            let (was, is) = (&self.data, &found.data);
            differences.push(format!("the data was {was}, is {is}"));
        }
        let held_out = [self, found].map(|of| of.held_out.as_ref());
        match held_out {
            [Some(was), Some(is)] => {
                if was.data != is.data {
                    let (was, is) = (&was.data, &is.data);
                    differences.push(format!("the held-out data was {was}, is {is}"));
                }
                let [was, is] = [was, is].map(|of| object(&of.schedule));
                differences
                    .extend(changes(&was, &is).map(|change| format!("of the evaluation {change}")));
            }
            [None, None] => {}
            [was, _] => {
                let [was, is] =
                    [was.is_some(), was.is_none()].map(|is| if is { "on" } else { "off" });
                differences.push(format!("the evaluation was {was}, is {is}"));
            }
        }
        differences.extend(changes(&self.settings, &found.settings));
        differences
    }
}

/// How a model computes: where, in which dtype and how accurately.
fn computation<M: Blocks>(model: &M, batches: &[Batch]) -> Map<String, Value> {
    let mut settings = Map::new();
    let mut insert = |name: &str, value: String| settings.insert(name.into(), value.into());
    if let Some(batch) = batches.first() {
        let x = model.embed(batch.tokens(), &model.positions(batch.spans()));
        insert("device", format!("{:?}", x.device()));
        insert("dtype", format!("{:?}", x.dtype()));
    }
    let linears = model.linears();
    let precisions = linears.iter().filter_map(|(_, of)| match of.weight() {
        Weight::Quant(weight) => Some(format!("{:?}", weight.precision())),
        Weight::Dense(_) => None,
    });
    let precisions: BTreeSet<String> = precisions.collect();
    insert("precision", Vec::from_iter(precisions).join(", "));
    insert("arithmetic", format!("{:?}", arithmetic()));
    settings
}

/// Settings as they are in a file.
fn object(settings: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(settings)) => settings,
        other => unreachable!("settings are an object of numbers and names: {other:?}"),
    }
}

/// The settings that are not the same, in words.
fn changes<'a>(
    was: &'a Map<String, Value>,
    is: &'a Map<String, Value>,
) -> impl Iterator<Item = String> + 'a {
    let names: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    let changed = names
        .into_iter()
        .filter(|name| was.get(*name) != is.get(*name));
    changed.map(move |name| {
        let [was, is] = [was, is].map(|of| match of.get(name) {
            Some(value) => value.to_string(),
            None => "not set".into(),
        });
        format!("the setting `{name}` was {was}, is {is}")
    })
}
