//! GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (Frantar et al. 2023, arXiv:2210.17323).
//!
//! | tensor | type, shape | |
//! |---|---|---|
//! | `PATH.qweight` | `I32 [d_in * bits / 32, d_out]` | codes, packed along the inputs |
//! | `PATH.qzeros` | `I32 [n_groups, d_out * bits / 32]` | zero-points, packed along the outputs |
//! | `PATH.scales` | `F16 [n_groups, d_out]` | |
//! | `PATH.g_idx` | `I32 [d_in]` | the group of each input |
//!
//! `w = scales (q - zeros)`. Version 1 stores `zeros - 1`, version 2 `zeros`.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use quant_core::{Format, Grid, Parts, QuantTensor};
use serde::Deserialize;
use serde_json::{Value, json};
use tensor_files::{FloatType, LazyTensor};

use super::directory::CONFIG;
use super::format::{LayerFormat, Layers, PackedLayer, Refusals, quant_error};
use super::kind::GptqVersion;
use super::packing::{pack, transpose, unpack};
use super::parameters::read;
use super::tensors::Tensors;
use crate::{CheckpointError, ConfigError, Error, Result};

pub(super) const METHOD: &str = "gptq";
/// The file that readers older than `quantization_config` look for.
pub(super) const CONFIG_FILE: &str = "quantize_config.json";

pub(super) struct Gptq {
    bits: usize,
    group_size: Option<usize>,
    symmetric: Symmetry,
    version: GptqVersion,
    wrapping: Wrapping,
    /// Whether layers may have their inputs in another order; of a model to be written, whether one has.
    desc_act: bool,
    /// The projections that are not packed, of a model to be written.
    dense: Vec<String>,
}

/// Whether all zero-points are the middle of the codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Symmetry {
    Yes,
    No,
    Unstated,
}

/// The result of storing a zero-point of 0 minus one.
///
/// GPTQModel subtracts a word of ones from a packed word, so that the field borrows from the next;
/// 3-bit codes, which cross words, it subtracts one by one. AutoGPTQ subtracts first and packs the
/// wrapped integers with OR, which sets all higher fields of the word. Others mask each field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrapping {
    /// The field borrows from the next one of its word.
    Words,
    /// The field wraps to the highest code.
    Fields,
    /// The program that wrote the checkpoint is not known.
    Unknown,
}

/// The settings of a configuration.
#[derive(Deserialize)]
struct Settings {
    bits: Option<u64>,
    group_size: Option<i64>,
    sym: Option<bool>,
    desc_act: Option<bool>,
    quant_method: Option<String>,
    checkpoint_format: Option<String>,
    /// The name of `checkpoint_format` in GPTQModel.
    format: Option<String>,
    is_marlin_format: Option<bool>,
    pack_dtype: Option<String>,
    meta: Option<Value>,
}

impl Gptq {
    /// Reads `quantization_config` in `config.json`, `quantize_config.json`, or both if they agree.
    pub(super) fn open(dir: &Path, embedded: Option<Value>) -> Result<Self> {
        let mut found = Vec::new();
        if let Some(json) = embedded {
            found.push(ConfigFile::new(json, dir.join(CONFIG))?);
        }
        let path = dir.join(CONFIG_FILE);
        if tensor_files::is_there(&path) {
            found.push(ConfigFile::new(tensor_files::read_json(&path)?, path)?);
        }
        if let [first, second] = &found[..] {
            first.check_agrees(second)?;
        }
        let path = || found[0].path.clone();
        let is_symmetric = |sym| found.iter().any(|file| file.settings.sym == Some(sym));
        let version = found.iter().find_map(|file| file.version);
        Ok(Self {
            bits: found[0].bits,
            group_size: found[0].group_size,
            symmetric: if is_symmetric(false) {
                Symmetry::No
            } else if is_symmetric(true) {
                Symmetry::Yes
            } else {
                Symmetry::Unstated
            },
            version: version.ok_or_else(|| CheckpointError::GptqVersion { path: path() })?,
            wrapping: if !found.iter().any(ConfigFile::is_by_gptqmodel) {
                Wrapping::Unknown
            } else if found[0].bits == 3 {
                Wrapping::Fields
            } else {
                Wrapping::Words
            },
            desc_act: found
                .iter()
                .any(|file| file.settings.desc_act == Some(true)),
            dense: Vec::new(),
        })
    }

    /// The format of layers that [`refusals`] does not list.
    pub(super) fn for_layers(layers: &Layers, version: GptqVersion) -> Self {
        let format = common_layer(&layers.packed).map(|layer| layer.format);
        Self {
            bits: format.map_or(4, |format| format.bits()),
            group_size: format.and_then(|format| format.group_size()),
            symmetric: if format.is_some_and(|format| format.grid() == Grid::Symmetric) {
                Symmetry::Yes
            } else {
                Symmetry::No
            },
            version,
            wrapping: Wrapping::Unknown,
            desc_act: layers.packed.iter().any(|layer| layer.has_order),
            dense: layers.dense.clone(),
        }
    }

    /// Unpacks the zero-points in `qzeros`, `[n_groups, d_out]`.
    ///
    /// Fails with the group and the output of a zero-point that is ambiguous.
    pub(super) fn zeros(&self, qzeros: &[u32], n_groups: usize) -> Result<Vec<u8>, (usize, usize)> {
        let bits = self.bits;
        let n_words = qzeros.len() / n_groups;
        let d_out = n_words * 32 / bits;
        let fields = |words: &[u32]| {
            let fields = unpack(&transpose(words, [n_groups, n_words]), n_groups, bits);
            transpose(&fields, [d_out, n_groups])
        };
        let highest = u8::MAX >> (8 - bits);
        if self.version == GptqVersion::V2 {
            return Ok(fields(qzeros));
        }
        if self.wrapping == Wrapping::Words {
            let ones = u32::MAX / u32::from(highest);
            let whole: Vec<u32> = qzeros.iter().map(|word| word.wrapping_add(ones)).collect();
            return Ok(fields(&whole));
        }
        let stored = fields(qzeros);
        if self.wrapping == Wrapping::Unknown {
            // A zero-point of 0 is stored as the highest code, whoever wrote it, unless the field
            // before it borrowed, of which the first in a word is again the highest code. So
            // without that code nothing wrapped; and at the end of a word there is nothing that it
            // could have changed. Anywhere else the fields after it depend on the writer.
            let ends_word = |o: usize| o * bits % 32 + bits >= 32;
            let mut all = stored.iter().enumerate();
            if let Some((at, _)) =
                all.find(|&(at, &code)| code == highest && !ends_word(at % d_out))
            {
                return Err((at / d_out, at % d_out));
            }
        }
        let zeros = stored.iter().map(|code| code.wrapping_add(1) & highest);
        Ok(zeros.collect())
    }

    /// Packs `zeros`, `[n_groups, d_out]`, into `qzeros`.
    fn qzeros(&self, zeros: &[u8], [n_groups, d_out]: [usize; 2]) -> Vec<u32> {
        let less = u8::from(self.version == GptqVersion::V1);
        let stored: Vec<u8> = zeros.iter().map(|zero| zero - less).collect();
        let words = pack(&transpose(&stored, [n_groups, d_out]), n_groups, self.bits);
        transpose(&words, [words.len() / n_groups, n_groups])
    }
}

/// The input of each row when inputs are sorted by their groups; `None` if they are sorted already.
fn input_order(groups: &[u32], group_size: usize) -> Result<Option<Vec<u32>>, String> {
    let d_in = groups.len();
    let n_groups = d_in.div_ceil(group_size);
    let mut sizes = vec![0; n_groups];
    for (input, &group) in groups.iter().enumerate() {
        let Some(size) = sizes.get_mut(group as usize) else {
            let group = group as i32;
            return Err(format!(
                "input {input} is in group {group}, but there are {n_groups}"
            ));
        };
        *size += 1;
    }
    let expected = |group: usize| group_size.min(d_in - group * group_size);
    if let Some(group) = (0..n_groups).find(|&group| sizes[group] != expected(group)) {
        let (found, expected) = (sizes[group], expected(group));
        return Err(format!("group {group} has {found} inputs, not {expected}"));
    }
    if groups.is_sorted() {
        return Ok(None);
    }
    let mut order: Vec<u32> = (0..).take(d_in).collect();
    order.sort_by_key(|&input| groups[input as usize]);
    Ok(Some(order))
}

/// A file with a configuration.
struct ConfigFile {
    path: PathBuf,
    settings: Settings,
    bits: usize,
    group_size: Option<usize>,
    version: Option<GptqVersion>,
}

impl ConfigFile {
    fn new(json: Value, path: PathBuf) -> Result<Self> {
        let refuse = |setting: &str, problem: String| {
            Error::from(ConfigError::setting(&path, setting, problem))
        };
        let settings: Settings = serde_json::from_value(json)
            .map_err(|error| refuse("quantization_config", format!("cannot be read: {error}")))?;
        if let Some(method) = settings.quant_method.as_deref().filter(|&m| m != METHOD) {
            return Err(refuse(
                "quant_method",
                format!("is `{method}`; this file is for {METHOD}"),
            ));
        }
        let bits = match settings.bits {
            Some(bits @ (2 | 3 | 4 | 8)) => bits as usize,
            Some(bits) => {
                let problem = format!("is {bits}; supported: 2, 3, 4, 8");
                return Err(refuse("bits", problem));
            }
            None => return Err(refuse("bits", "is missing".into())),
        };
        let group_size = match settings.group_size {
            Some(-1) => None,
            Some(size) => match usize::try_from(size) {
                Ok(size @ 1..) => Some(size),
                _ => {
                    let problem = format!("is {size}; it must be positive, or -1 for one group");
                    return Err(refuse("group_size", problem));
                }
            },
            None => return Err(refuse("group_size", "is missing".into())),
        };
        if settings.is_marlin_format == Some(true) {
            return Err(refuse("is_marlin_format", "is not supported".into()));
        }
        if let Some(dtype) = settings.pack_dtype.as_deref().filter(|&d| d != "int32") {
            let problem = format!("is `{dtype}`; supported: int32");
            return Err(refuse("pack_dtype", problem));
        }
        let mut version = None;
        let named = [
            ("checkpoint_format", &settings.checkpoint_format),
            ("format", &settings.format),
        ];
        for (setting, name) in named {
            let Some(name) = name else { continue };
            let stated = match name.as_str() {
                "gptq" => GptqVersion::V1,
                "gptq_v2" => GptqVersion::V2,
                other => {
                    let problem = format!("is `{other}`; supported: gptq, gptq_v2");
                    return Err(refuse(setting, problem));
                }
            };
            if version.is_some_and(|version| version != stated) {
                let problem = format!(
                    "is `{name}`, but `checkpoint_format` is another; correct one of the two"
                );
                return Err(refuse(setting, problem));
            }
            version = Some(stated);
        }
        Ok(Self {
            path,
            settings,
            bits,
            group_size,
            version,
        })
    }

    fn check_agrees(&self, other: &Self) -> Result<()> {
        let group = |file: &Self| file.settings.group_size.unwrap_or(-1).to_string();
        let mut settings = vec![
            ("bits", self.bits.to_string(), other.bits.to_string()),
            ("group_size", group(self), group(other)),
        ];
        // A file that states no version leaves it to the other one.
        if let Some((first, second)) = self.version.zip(other.version) {
            let name = |version| name(version).to_string();
            settings.push(("checkpoint_format", name(first), name(second)));
        }
        for (setting, in_first, in_second) in settings {
            if in_first != in_second {
                let error = ConfigError::Disagreement {
                    first: self.path.clone(),
                    second: other.path.clone(),
                    setting,
                    in_first,
                    in_second,
                };
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Whether GPTQModel wrote the checkpoint, by `meta.quantizer`: names with versions, or one.
    fn is_by_gptqmodel(&self) -> bool {
        let quantizer = self.settings.meta.as_ref().map(|meta| &meta["quantizer"]);
        let is = |value: &Value| value.as_str().is_some_and(|s| s.starts_with("gptqmodel:"));
        quantizer.is_some_and(|found| match found {
            Value::Array(all) => all.iter().any(is),
            one => is(one),
        })
    }
}

/// The name of a version in `checkpoint_format`.
fn name(version: GptqVersion) -> &'static str {
    match version {
        GptqVersion::V1 => "gptq",
        GptqVersion::V2 => "gptq_v2",
    }
}

/// The layers whose formats a GPTQ checkpoint cannot hold, whatever their values.
pub(super) fn refusals(layers: &[PackedLayer]) -> Refusals {
    let common = common_layer(layers);
    let reasons = layers.iter().map(|layer| {
        let reasons = reasons_against_format(layer, common);
        (layer.path.clone(), reasons.join("; "))
    });
    reasons.filter(|(_, reasons)| !reasons.is_empty()).collect()
}

/// The first layer whose grid GPTQ has: the others must have its format.
fn common_layer(layers: &[PackedLayer]) -> Option<&PackedLayer> {
    let mut layers = layers.iter();
    layers.find(|layer| !layer.format.grid().is_codebook())
}

/// The reasons why a GPTQ checkpoint cannot hold weights of a format.
fn reasons_against_format(layer: &PackedLayer, common: Option<&PackedLayer>) -> Vec<String> {
    let &PackedLayer {
        format,
        dims: [d_in, d_out],
        ..
    } = layer;
    let bits = format.bits();
    if format.grid().is_codebook() {
        return vec![format!("is {format}, and GPTQ's grids are uniform")];
    }
    let mut reasons = Vec::new();
    if let Some(first) = common.filter(|first| first.format != format) {
        reasons.push(format!(
            "is {format}, `{}` is {}, and there is one format for all",
            first.path, first.format
        ));
    }
    let group_size = format.group_size().unwrap_or(d_in);
    if !d_in.is_multiple_of(group_size) {
        reasons.push(format!(
            "has a short last group: {d_in} inputs in groups of {group_size}"
        ));
    }
    for (n, what) in [(d_in, "inputs"), (d_out, "outputs")] {
        if !(n * bits).is_multiple_of(32) {
            reasons.push(format!(
                "its {n} {what} of {bits} bits do not fill words of 32"
            ));
        }
    }
    reasons
}

/// The reasons why a GPTQ checkpoint cannot hold the values of a weight; none for one that is refused for
/// its format.
pub(super) fn reasons_against_values(weight: &QuantTensor, version: GptqVersion) -> Vec<String> {
    if weight.format().grid().is_codebook() {
        return Vec::new();
    }
    let ([_, d_out], bits, layout) = (weight.dims(), weight.format().bits(), weight.layout());
    let group_size = layout.group_size();
    let mut reasons = Vec::new();
    if let Some(order) = weight.input_order()
        && (order.is_sorted() || order.chunks(group_size).any(|group| !group.is_sorted()))
    {
        reasons.push("has its inputs in an order that g_idx does not state".into());
    }
    let inexact = kernels::with_values(weight.scales(), |scales| {
        scales.iter().filter(|&&s| !FloatType::F16.holds(s)).count()
    });
    if inexact > 0 {
        let n = layout.n_groups() * d_out;
        reasons.push(format!(
            "has {inexact} scales of {n} that f16 does not hold exactly"
        ));
    }
    if let Some(zeros) = weight.zeros() {
        let zeros = read(zeros);
        let count = |is: &dyn Fn(f32) -> bool| zeros.iter().filter(|&&z| is(z)).count();
        let highest = ((1 << bits) - 1) as f32;
        let fractional = count(&|z| z.fract() != 0.0 || (z == 0.0 && z.is_sign_negative()));
        let outside = count(&|z| !(0.0..=highest).contains(&z));
        let at_zero = count(&|z| z == 0.0);
        if fractional > 0 {
            reasons.push(format!("has {fractional} zeros that are not whole"));
        }
        if outside > 0 {
            reasons.push(format!("has {outside} zeros outside of 0 to {highest}"));
        }
        if at_zero > 0 && version == GptqVersion::V1 {
            reasons.push(format!("has {at_zero} zeros of 0, which v1 cannot store"));
        }
    }
    reasons
}

/// See [`LayerFormat::packed_tensor`], which needs no configuration in this format.
pub(super) fn packed_tensor(tensors: &Tensors, path: &str) -> Option<String> {
    Some(format!("{path}.qweight")).filter(|name| tensors.contains(name))
}

impl LayerFormat for Gptq {
    fn packed_tensor(&self, tensors: &Tensors, path: &str) -> Option<String> {
        packed_tensor(tensors, path)
    }

    /// Where the configuration does not state `sym`, an affine grid, although the zeros may turn out to
    /// be those of a symmetric one.
    fn format(&self, tensors: &mut Tensors, path: &str, _: [usize; 2]) -> Result<Option<Format>> {
        if self.packed_tensor(tensors, path).is_none() {
            return Ok(None);
        }
        let grid = match self.symmetric {
            Symmetry::Yes => Grid::Symmetric,
            Symmetry::No | Symmetry::Unstated => Grid::Affine,
        };
        let format = Format::new(self.bits, self.group_size, grid);
        Ok(Some(format.map_err(quant_error(path))?))
    }

    fn read(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Option<QuantTensor>> {
        let Some(qweight) = self.packed_tensor(tensors, path) else {
            return Ok(None);
        };
        let quant = quant_error(path);
        let ([d_in, d_out], bits) = (dims, self.bits);
        let affine = Format::new(bits, self.group_size, Grid::Affine).map_err(&quant)?;
        let layout = affine.layout(dims).map_err(&quant)?;
        for (n, what) in [(d_in, "inputs"), (d_out, "outputs")] {
            if !n.checked_mul(bits).is_some_and(|n| n.is_multiple_of(32)) {
                let problem = format!("{n} {what} of {bits} bits do not fill words of 32");
                return Err(tensors.refuse(&qweight, problem));
            }
        }
        let mut columns = tensors.words(&qweight, [d_in * bits / 32, d_out])?;
        let grid @ [n_groups, _] = layout.grid_shape();
        let scales = tensors.floats(&format!("{path}.scales"), grid)?;
        let qzeros_name = format!("{path}.qzeros");
        let qzeros = tensors.words(&qzeros_name, [n_groups, d_out * bits / 32])?;
        let zeros = self.zeros(&qzeros, n_groups);
        let zeros = zeros.map_err(|(group, output)| CheckpointError::WrappedZeros {
            path: tensors.path(&qzeros_name),
            tensor: qzeros_name.clone(),
            group,
            output,
        })?;
        let g_idx = format!("{path}.g_idx");
        let input_order = if tensors.contains(&g_idx) {
            let groups = tensors.words(&g_idx, [d_in])?;
            let order = input_order(&groups, layout.group_size());
            order.map_err(|problem| tensors.refuse(&g_idx, problem))?
        } else if self.desc_act {
            let path = tensors.path(&qweight);
            let tensor = g_idx;
            return Err(tensor_files::Error::MissingTensor { path, tensor }.into());
        } else {
            None
        };
        if let Some(order) = &input_order {
            let codes = unpack(&columns, d_out, bits);
            let rows = order.iter().map(|&input| input as usize * d_out);
            let rows = rows.flat_map(|start| &codes[start..][..d_out]);
            columns = pack(&rows.copied().collect::<Vec<u8>>(), d_out, bits);
        }

        let middle = 1 << (bits - 1);
        let other = zeros.iter().find(|&&zero| zero != middle);
        if let (Symmetry::Yes, Some(zero)) = (self.symmetric, other) {
            let problem = format!(
                "has a zero-point of {zero}, but `sym` is true, which makes all of them {middle}: `checkpoint_format` is the wrong one, or `sym`"
            );
            return Err(tensors.refuse(&qzeros_name, problem));
        }
        let (format, zeros) = if self.symmetric != Symmetry::No && other.is_none() {
            let format = Format::new(bits, self.group_size, Grid::Symmetric);
            (format.map_err(&quant)?, None)
        } else {
            (affine, Some(zeros.into_iter().map(f32::from).collect()))
        };
        let parts = Parts::from_columns(&columns, &layout, scales, zeros).map_err(&quant)?;
        let parts = Parts {
            input_order,
            ..parts
        };
        let weight = QuantTensor::from_parts(parts, format, dims, device);
        Ok(Some(weight.map_err(quant)?))
    }

    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)> {
        let name = |part: &str| format!("{path}.{part}");
        let (bits, [d_in, d_out]) = (self.bits, weight.dims());
        let (grid, group_size) = (weight.layout().grid_shape(), weight.layout().group_size());
        let qweight = move || match weight.input_order() {
            None => weight.columns(),
            Some(_) => pack(&weight.codes(), d_out, bits),
        };
        let zeros = match weight.zeros() {
            Some(zeros) => read(zeros).into_iter().map(|zero| zero as u8).collect(),
            None => vec![1 << (bits - 1); grid[0] * d_out],
        };
        let qzeros = self.qzeros(&zeros, grid);
        let g_idx = move || {
            let mut groups = vec![0; d_in];
            let order = weight.input_order();
            let order = order.unwrap_or_else(|| (0..).take(d_in).collect());
            for (row, input) in order.into_iter().enumerate() {
                groups[input as usize] = (row / group_size) as u32;
            }
            groups
        };
        vec![
            (
                name("qweight"),
                LazyTensor::words([d_in * bits / 32, d_out], qweight),
            ),
            (
                name("qzeros"),
                LazyTensor::words([grid[0], d_out * bits / 32], move || qzeros.clone()),
            ),
            (
                name("scales"),
                LazyTensor::floats_as(FloatType::F16, grid, || read(weight.scales())),
            ),
            (name("g_idx"), LazyTensor::words([d_in], g_idx)),
        ]
    }

    fn config(&self) -> Value {
        let version = name(self.version);
        let mut config = json!({
            "bits": self.bits,
            "group_size": self.group_size.map_or(-1, |size| size as i64),
            "desc_act": self.desc_act,
            "sym": self.symmetric == Symmetry::Yes,
            "lm_head": false,
            "quant_method": METHOD,
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            "meta": { "quantizer": [concat!("quant-core:", env!("CARGO_PKG_VERSION"))] },
        });
        if !self.dense.is_empty() {
            // GPTQModel's rules for layers: a `-:` before an expression leaves out what it matches.
            let rules = self.dense.iter().map(|path| {
                let expression = path.replace('.', "\\.");
                (format!("-:^{expression}$"), json!({}))
            });
            config["dynamic"] = rules.collect();
        }
        config
    }

    fn config_file(&self) -> Option<&'static str> {
        Some(CONFIG_FILE)
    }
}
