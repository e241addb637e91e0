use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn::module::Param;
use peft::{Certificate, Exactness, Fingerprint, Linears, MergedLayer, Weight};
use serde_json::{Map, Value as Json};
use tensor_files::gguf::{BlockType, GgufFile, GgufTensor, Value, write_gguf};
use tensor_files::{FloatType, IntoOutput};

use super::blocks::{block_type, pack};
use super::layers::Layers;
use super::names::{self, Architecture, ROPE_FREQS, inverse, reordered};
use super::{FILE, shape, vocabulary};
use crate::checkpoint::directory::{CERTIFICATE, CHAT_TEMPLATE, Files, TOKENIZER};
use crate::checkpoint::format::{self, Refusals, quant_error};
use crate::checkpoint::kind::CheckpointFormat;
use crate::checkpoint::packing::transpose;
use crate::checkpoint::parameters::{
    Parameter, check_no_adapters, parameters, read, state_float, state_head,
};
use crate::source::{HEAD, weight_name};
use crate::{CheckpointError, ConfigError, LlamaConfig, Model, Pretrained, Result};

/// The types of the tensors of a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GgufType {
    /// The type that holds each parameter best: for packed layers, blocks with their codes, whose scales and
    /// minimums are rounded to `f16`; for the others, the shortest type that holds them exactly.
    Auto,
    /// Floats of one type for all matrices; packed layers are unpacked. Vectors are `f32`.
    Dense(FloatType),
}

/// One layer of a [`GgufReport`].
#[derive(Clone, Debug, PartialEq)]
pub struct GgufLayer {
    /// The path of the layer.
    pub path: String,
    /// The type of its weight.
    pub block_type: BlockType,
    /// `‖Ŵ - W‖ / ‖W‖`, with the weight `W` of the model and `Ŵ` of the file.
    pub relative_error: f64,
    /// The largest difference of an element.
    pub max_error: f64,
    /// The largest magnitude of an element of the weight.
    pub max_weight: f64,
}

/// The effect of writing the layers of a model to a GGUF file, measured on the file.
///
/// Values of the file are those of llama.cpp's formulas in `f32`, such as `d q + m`: where no scale is rounded,
/// they differ from those of this crate by the rounding of that arithmetic, about 10⁻⁷.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufReport {
    /// The projections, and the head if it is no table.
    pub layers: Vec<GgufLayer>,
}

impl fmt::Display for GgufReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut types: Vec<String> = self
            .layers
            .iter()
            .map(|of| of.block_type.to_string())
            .collect();
        types.sort_unstable();
        types.dedup();
        write!(f, "{} layers in {}", self.layers.len(), types.join(", "))?;
        let worst = self
            .layers
            .iter()
            .max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        match worst {
            Some(worst) => write!(
                f,
                "; written within {:.1e} of each, the most in `{}`",
                worst.relative_error, worst.path
            ),
            None => Ok(()),
        }
    }
}

/// Saves a model in a new directory as `model.gguf` for llama.cpp, beside the other files of a model.
///
/// [`load`](crate::load) reads the directory, or the file alone. The scales and minimums of packed layers are
/// `f16` in it: [`CheckpointFormat::stored_grid`] rounds to them when adapters are merged, and
/// [`save_as`](crate::save_as) refuses what would be rounded; this function rounds, and measures the effect on the
/// file that it has written. A certificate then bounds it, layer by layer, and is for the model as it is loaded
/// again; none is written if a packed head is rounded.
///
/// # Errors
/// [`CheckpointError::CannotHold`] with all layers that blocks cannot hold: codebooks, orders of inputs, groups
/// that are no multiples of 32, affine grids of 8 bits. [`ConfigError::Setting`] for architectures and tokenizers
/// that the format does not hold; otherwise as [`save`](crate::save).
///
/// # Examples
/// ```no_run
/// use models::GgufType;
/// use quant_core::Rtn;
///
/// let mut lm = models::load("SmolLM2-135M-Instruct", &burn::tensor::Device::flex())?;
/// models::quantize(&mut lm.model, &Rtn::new().with_group_size(64), &[], |_| {})?;
/// println!("{}", models::save_gguf(&lm, "SmolLM2-135M-Instruct-gguf", GgufType::Auto)?);
/// // llama-cli -m SmolLM2-135M-Instruct-gguf/model.gguf
/// # Ok::<(), models::Error>(())
/// ```
pub fn save_gguf(lm: &Pretrained, dir: impl IntoOutput, of: GgufType) -> Result<GgufReport> {
    check_no_adapters(&lm.model)?;
    if let Some(certificate) = &lm.certificate {
        let verified = certificate.verify(&lm.model);
        verified.map_err(|source| CheckpointError::OtherCertificate { source })?;
    }
    let GgufType::Dense(float) = of else {
        let mut rounded = lm.clone();
        let paths = round(&mut rounded.model)?;
        return write(
            &rounded,
            dir,
            None,
            |report| {
                // A certificate lists projections, and cannot state what is rounded of the head.
                let certificate = lm.certificate.as_ref();
                let certificate = certificate.filter(|_| !paths.iter().any(|path| path == HEAD));
                certificate.map(|of| bounded(of, report, &paths, &rounded.model))
            },
            &lm.model,
        );
    };
    write(lm, dir, Some(float), |_| None, &lm.model)
}

/// Saves a model that the format holds exactly.
pub(in crate::checkpoint) fn save(lm: &Pretrained, dir: impl IntoOutput) -> Result<()> {
    write(lm, dir, None, |_| lm.certificate.clone(), &lm.model).map(drop)
}

fn cannot_hold(layers: Refusals) -> crate::Error {
    let error = CheckpointError::CannotHold {
        format: CheckpointFormat::Gguf,
        layers,
        instead: CheckpointFormat::QuantCore,
    };
    error.into()
}

/// Rounds the scales and zeros of packed layers to those that blocks hold, and returns the changed layers.
fn round(model: &mut Model) -> Result<Vec<String>> {
    let mut refusals = Refusals::new();
    let linears = model.linears().into_iter();
    let linears = linears.map(|(path, linear)| (path, linear.weight()));
    for (path, weight) in linears.chain(model.other_weights()) {
        if let Weight::Quant(weight) = weight
            && let Err(problem) = block_type(weight)
        {
            refusals.push((path, problem));
        }
    }
    if !refusals.is_empty() {
        return Err(cannot_hold(refusals));
    }
    let grid = CheckpointFormat::Gguf.stored_grid();
    let mut changed = Vec::new();
    let round = |path: &str, weight: &Weight| match weight {
        Weight::Quant(weight) if !grid.holds(weight) => {
            let rounded = weight.clone().rounded_to(grid);
            Ok(Some(Weight::Quant(rounded.map_err(quant_error(path))?)))
        }
        _ => Ok::<_, crate::Error>(None),
    };
    for (path, linear) in model.linears_mut() {
        if let Some(weight) = round(&path, linear.weight())? {
            *linear = linear.with_weight(weight);
            changed.push(path);
        }
    }
    if let Some(head) = &model.lm_head
        && let Some(weight) = round(HEAD, head)?
    {
        model.lm_head = Some(weight);
        changed.push(HEAD.into());
    }
    Ok(changed)
}

/// The certificate of a model whose layers at `paths` were rounded further.
fn bounded(
    certificate: &Certificate,
    report: &GgufReport,
    paths: &[String],
    model: &Model,
) -> Certificate {
    let written: BTreeMap<&str, &GgufLayer> = report
        .layers
        .iter()
        .map(|layer| (layer.path.as_str(), layer))
        .collect();
    let mut certificate = certificate.clone();
    for path in paths {
        let Some(written) = written.get(path.as_str()) else {
            continue;
        };
        let (error, largest) = (written.max_error, written.max_weight);
        let further = |exactness| match exactness {
            Exactness::Bounded {
                max_weight_error, ..
            } => Exactness::Bounded {
                max_weight_error: max_weight_error + error,
                max_weight: largest,
            },
            Exactness::Rounded {
                relative_error,
                retention,
            } => Exactness::Rounded {
                relative_error: relative_error + written.relative_error,
                retention,
            },
            _ => Exactness::Bounded {
                max_weight_error: error,
                max_weight: largest,
            },
        };
        let layers = &mut certificate.layers;
        match layers.iter_mut().find(|layer| layer.path == *path) {
            Some(layer) => layer.exactness = further(layer.exactness),
            None => {
                let linears = model.linears().into_iter();
                let format = linears
                    .filter(|(of, _)| of == path)
                    .find_map(|(_, linear)| linear.weight().format());
                layers.push(MergedLayer {
                    path: path.clone(),
                    // Of a layer without an adapter.
                    method: "none".into(),
                    format,
                    exactness: further(Exactness::Exact),
                });
            }
        }
    }
    if !paths.is_empty() {
        certificate.merged = Fingerprint::of(model);
        // Its logits are those before the rounding.
        certificate.probe = None;
    }
    certificate
}

/// Writes a model of which the format holds every layer, or dense weights in a type of float. Layers are compared
/// with those of `original`.
fn write(
    lm: &Pretrained,
    dir: impl IntoOutput,
    dense: Option<FloatType>,
    certificate: impl FnOnce(&GgufReport) -> Option<Certificate>,
    original: &Model,
) -> Result<GgufReport> {
    let model = &lm.model;
    let model_type = lm.config.get("model_type").and_then(Json::as_str);
    let model_type = model_type.unwrap_or_default();
    let config_path = lm.dir.join("config.json");
    let refuse = |setting: &str, problem| ConfigError::setting(&config_path, setting, problem);
    let (Some(architecture), Some(shape)) = (
        Architecture::of_model_type(model_type),
        names::shape(model.config()),
    ) else {
        let problem = format!("is `{model_type}`; GGUF is written for llama, mistral, qwen2");
        return Err(refuse("model_type", problem).into());
    };
    let name = lm.config.get("_name_or_path").and_then(Json::as_str);
    let (mut metadata, factors) = shape::metadata(architecture, shape, name.unwrap_or(model_type))
        .map_err(|(setting, problem)| refuse(setting, problem))?;
    metadata.extend(of_tokenizer(lm)?);
    let tensors = Tensors {
        architecture,
        shape,
        dense,
    };
    let mut config = lm.config.clone();
    let layers = match dense {
        None => format::Layers::of(model),
        Some(float) => {
            state_float(&mut config, float);
            format::Layers::default()
        }
    };
    config.insert("quantization_config".into(), Layers::of(&layers).to_json());
    state_head(&mut config, model.lm_head.is_some());
    let files = Files {
        config: &config,
        carried: &lm.carried,
        second: None,
        certificate: None,
    };
    let report = RefCell::new(GgufReport::default());
    files.write(dir, |weights| {
        let path = weights.with_file_name(FILE);
        let mut all = tensors.of(model);
        if let Some(factors) = &factors {
            let bytes = BlockType::F32.floats(factors).expect("a type of float");
            let tensor = GgufTensor::new(BlockType::F32, [factors.len()], || bytes);
            all.push((ROPE_FREQS.into(), tensor));
        }
        write_gguf(&path, &metadata, all)?;
        let measured = tensors.measure(&path, original)?;
        if let Some(certificate) = certificate(&measured) {
            certificate.save(weights.with_file_name(CERTIFICATE))?;
        }
        report.replace(measured);
        Ok(())
    })?;
    Ok(report.into_inner())
}

/// The metadata of the tokenizer of a model; none if it has no tokenizer.
fn of_tokenizer(lm: &Pretrained) -> Result<Vec<(String, Value)>> {
    let json = match (lm.carried.get(TOKENIZER), &lm.tokenizer) {
        (Some(json), _) => json.clone(),
        (None, Some(tokenizer)) => tokenizer.to_json(),
        (None, None) => return Ok(Vec::new()),
    };
    let path = lm.tokenizer()?.path().to_owned();
    let refuse = |problem: String| ConfigError::setting(&path, "the tokenizer", problem);
    let tokenizer: Map<String, Json> =
        serde_json::from_slice(&json).map_err(|error| refuse(error.to_string()))?;
    let special = lm.special_tokens()?;
    let of = |token: &Option<crate::SpecialToken>| token.as_ref().map(|token| token.id);
    let special_ids = [
        ("bos", of(&special.bos)),
        ("eos", of(&special.eos)),
        ("pad", of(&special.pad)),
        ("unk", of(&special.unk)),
    ];
    let template = lm.carried.get(CHAT_TEMPLATE);
    let template = template.and_then(|text| std::str::from_utf8(text).ok());
    let values = vocabulary::metadata(
        &Json::Object(tokenizer),
        special_ids,
        special.add_bos,
        &lm.stop_tokens,
        template,
        lm.model.config().vocab_size(),
    );
    Ok(values.map_err(|problem| refuse(problem.into()))?)
}

/// The tensors of a model of an architecture.
struct Tensors<'a> {
    architecture: Architecture,
    shape: &'a LlamaConfig,
    /// The type of all matrices, if it is one.
    dense: Option<FloatType>,
}

impl Tensors<'_> {
    /// The tensors of a file with their names.
    fn of<'m>(&self, model: &'m Model) -> Vec<(String, GgufTensor<'m>)> {
        let all = parameters(model).into_iter().map(|parameter| {
            let name = match &parameter {
                Parameter::Packed { path, .. } => weight_name(path),
                Parameter::Vector(name, _)
                | Parameter::Table(name, _)
                | Parameter::Dense(name, _) => name.clone(),
            };
            let rows = names::row_order(self.architecture, self.shape, &name);
            let in_file = rows.as_deref().map(inverse);
            let tensor = match parameter {
                Parameter::Packed { weight, .. } if self.dense.is_none() => {
                    let of = block_type(weight).expect("checked before anything is written");
                    let [d_in, d_out] = weight.dims();
                    GgufTensor::new(of, [d_out, d_in], move || pack(weight, of, rows.as_deref()))
                }
                Parameter::Packed { weight, .. } => self.matrix(
                    Weight::Dense(Param::from_tensor(weight.dequantize())),
                    in_file,
                ),
                Parameter::Dense(_, weight) => {
                    self.matrix(Weight::Dense(Param::from_tensor(weight)), in_file)
                }
                Parameter::Table(_, table) => {
                    let dims = table.dims();
                    let of = self.float(&Parameter::Table(name.clone(), table.clone()));
                    GgufTensor::new(of, dims, move || {
                        of.floats(&read(table)).expect("a type of float")
                    })
                }
                Parameter::Vector(_, vector) => {
                    // llama.cpp adds and multiplies them in f32.
                    GgufTensor::new(BlockType::F32, vector.dims(), move || {
                        let mut values = read(vector);
                        if let Some(order) = in_file {
                            values = reordered(&values, 1, &order);
                        }
                        BlockType::F32.floats(&values).expect("a type of float")
                    })
                }
            };
            (names::tensor(&name).unwrap_or(name), tensor)
        });
        all.collect()
    }

    fn matrix<'m>(&self, weight: Weight, in_file: Option<Vec<usize>>) -> GgufTensor<'m> {
        let weight = weight.to_dense();
        let dims @ [d_in, d_out] = weight.dims();
        let of = self.float(&Parameter::Dense(String::new(), weight.clone()));
        GgufTensor::new(of, [d_out, d_in], move || {
            let mut values = transpose(&read(weight), dims);
            if let Some(order) = in_file {
                values = reordered(&values, d_in, &order);
            }
            of.floats(&values).expect("a type of float")
        })
    }

    /// The type of a dense matrix: the shortest that holds it, unless all have one.
    fn float(&self, parameter: &Parameter) -> BlockType {
        let float = self.dense.unwrap_or_else(|| parameter.holding()[0]);
        match float {
            FloatType::F32 => BlockType::F32,
            FloatType::F16 => BlockType::F16,
            FloatType::Bf16 => BlockType::BF16,
        }
    }

    /// Compares the layers of a file with those of a model.
    fn measure(&self, path: &Path, model: &Model) -> Result<GgufReport> {
        let mut file = GgufFile::open(path)?;
        let linears = model.linears().into_iter();
        let linears = linears.map(|(path, linear)| (path, linear.weight()));
        let others = model.other_weights().into_iter();
        let mut layers = Vec::new();
        for (path, weight) in linears.chain(others) {
            let name = weight_name(&path);
            let [d_in, d_out] = weight.dims();
            let tensor = names::tensor(&name).unwrap_or_else(|| name.clone());
            let Some(block_type) = file.block_type(&tensor) else {
                continue;
            };
            let mut found = file.values(&tensor, [d_out, d_in])?;
            if let Some(rows) = names::row_order(self.architecture, self.shape, &name) {
                found = reordered(&found, d_in, &rows);
            }
            let expected = transpose(&read(weight.to_dense()), [d_in, d_out]);
            let (mut error, mut all) = (0.0, 0.0);
            let (mut max_error, mut max_weight) = (0f64, 0f64);
            for (&found, &expected) in found.iter().zip(&expected) {
                let (found, expected) = (f64::from(found), f64::from(expected));
                error += (found - expected).powi(2);
                all += expected.powi(2);
                max_error = max_error.max((found - expected).abs());
                max_weight = max_weight.max(expected.abs());
            }
            layers.push(GgufLayer {
                path,
                block_type,
                relative_error: if all == 0.0 {
                    0.0
                } else {
                    (error / all).sqrt()
                },
                max_error,
                max_weight,
            });
        }
        Ok(GgufReport { layers })
    }
}
