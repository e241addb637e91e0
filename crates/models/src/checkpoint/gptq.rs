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

mod config;
mod rules;
mod words;
mod zeros;

use std::path::PathBuf;

use burn::tensor::Device;
use quant_core::{Format, Grid, Parts, QuantTensor};
use serde_json::Value;
use tensor_files::{FloatType, LazyTensor};

use self::config::LayerSettings;
pub(super) use self::config::{ConfigFile, base_names, config_files};
use self::rules::Rule;
use self::words::{check_shape, column_words, row_words, word_bytes};
pub(super) use self::zeros::{Wrapping, Zeros};
use super::format::{LayerFormat, Layers, PackedLayer, Refusals, quant_error};
use super::kind::GptqVersion;
use super::packing::{pack, unpack};
use super::parameters::read;
use super::tensors::Tensors;
use crate::source::HEAD;
use crate::{CheckpointError, ConfigError, Error, Result};

pub(super) const METHOD: &str = "gptq";
/// The file that readers older than `quantization_config` look for.
pub(super) const CONFIG_FILE: &str = "quantize_config.json";

pub(super) struct Gptq {
    /// The settings of layers for which there is no rule.
    layers: LayerSettings,
    rules: Vec<Rule>,
    /// Whether the head may be packed.
    lm_head: bool,
    version: GptqVersion,
    is_by_gptqmodel: bool,
    /// The configuration that was read.
    config: PathBuf,
}

/// Whether all zero-points are the middle of the codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Symmetry {
    Yes,
    No,
    Unstated,
}

impl Gptq {
    /// Reads the configurations of a directory, which agree, with its tensors.
    pub(super) fn open(files: Vec<ConfigFile>, tensors: &mut Tensors) -> Result<Self> {
        let stated = files.iter().find_map(|file| file.version);
        let is_by_gptqmodel = files.iter().any(|file| file.is_by_gptqmodel);
        let lm_head = files.iter().any(|file| file.lm_head);
        let mut files = files.into_iter();
        let first = files.next().expect("a configuration at least");
        let (layers, rules) = files.fold((first.layers, first.rules), |(layers, rules), other| {
            let rules = if rules.is_empty() { other.rules } else { rules };
            (other.stated.or(layers), rules)
        });
        let mut format = Self {
            layers,
            rules,
            lm_head,
            version: stated.unwrap_or(GptqVersion::V1),
            is_by_gptqmodel,
            config: first.path,
        };
        if stated.is_none() {
            let path = format.config.clone();
            let version = format.version_of_zeros(tensors)?;
            format.version = version.ok_or(CheckpointError::GptqVersion { path })?;
        }
        Ok(format)
    }

    /// The version that the zero-points of all symmetric layers have in common: as those are the middle of the
    /// codes, only one is right.
    fn version_of_zeros(&self, tensors: &mut Tensors) -> Result<Option<GptqVersion>> {
        let mut common = None;
        for name in tensors.names() {
            let Some(path) = name.strip_suffix(".qzeros") else {
                continue;
            };
            let layer = self.layer(path)?;
            let Some(layer) = layer.filter(|layer| layer.symmetric == Symmetry::Yes) else {
                continue;
            };
            let stored = tensors.peek(&name)?;
            let n_groups = stored.shape[0];
            let words = row_words(&stored).map_err(|problem| tensors.refuse(&name, problem))?;
            if words.is_empty() {
                return Ok(None);
            }
            let version = zeros::version_of_middles(&words, n_groups, layer.bits);
            if version.is_none() || common.is_some_and(|common| Some(common) != version) {
                return Ok(None);
            }
            common = version;
        }
        Ok(common)
    }

    /// The format of layers that [`refusals`] does not list.
    pub(super) fn for_layers(layers: &Layers, version: GptqVersion) -> Self {
        let all = layers.packed.iter().chain(&layers.head);
        let mut settings: Vec<(LayerSettings, usize)> = Vec::new();
        for layer in all.clone() {
            let of_layer = settings_of(layer.format);
            match settings.iter_mut().find(|(known, _)| *known == of_layer) {
                Some((_, n)) => *n += 1,
                None => settings.push((of_layer, 1)),
            }
        }
        // The first of those that most layers have.
        let most = settings.iter().rev().max_by_key(|(_, n)| *n);
        let none = LayerSettings {
            bits: 4,
            group_size: None,
            symmetric: Symmetry::No,
            desc_act: false,
        };
        let common = most.map_or(none, |(common, _)| *common);
        let changed = all.clone().filter_map(|layer| {
            let stated = settings_of(layer.format).unlike(common)?;
            Some(Rule::of_layer(&layer.path, Some(stated)))
        });
        let left_out = layers.dense.iter();
        let left_out = left_out.map(|path| Rule::of_layer(path, None));
        Self {
            layers: LayerSettings {
                desc_act: all.clone().any(|layer| layer.has_order),
                ..common
            },
            rules: left_out.chain(changed).collect(),
            lm_head: layers.head.is_some(),
            version,
            is_by_gptqmodel: false,
            config: PathBuf::new(),
        }
    }

    /// The settings of the layer at a path, unless a rule leaves it out.
    fn layer(&self, path: &str) -> Result<Option<LayerSettings>> {
        match self.rule(path)? {
            None => Ok(Some(self.layers)),
            Some(rule) => Ok(rule.stated.map(|stated| stated.or(self.layers))),
        }
    }

    /// The first rule for the layer at a path.
    fn rule(&self, path: &str) -> Result<Option<&Rule>> {
        for rule in &self.rules {
            let matches = rule.matches(path);
            if matches.map_err(|problem| self.refuse(rule, problem))? {
                return Ok(Some(rule));
            }
        }
        Ok(None)
    }

    /// The settings of a packed layer.
    fn packed_layer(&self, path: &str, qweight: &str) -> Result<LayerSettings> {
        if path == HEAD && !self.lm_head {
            let problem =
                format!("is not true, but there is a packed head, `{qweight}`: state `true`");
            return Err(ConfigError::setting(&self.config, "lm_head", problem).into());
        }
        if let Some(layer) = self.layer(path)? {
            return Ok(layer);
        }
        let rule = self.rule(path)?.expect("a rule leaves the layer out");
        let problem = format!("leaves out `{path}`, but there is a packed tensor `{qweight}`");
        Err(self.refuse(rule, problem))
    }

    fn refuse(&self, rule: &Rule, problem: String) -> Error {
        let setting = format!("dynamic.`{}`", rule.key);
        ConfigError::setting(&self.config, &setting, problem).into()
    }

    /// The representation of the zero-points of a layer whose words have so many bytes.
    fn zeros(&self, bits: usize, word_bytes: usize) -> Zeros {
        Zeros {
            bits,
            version: self.version,
            wrapping: match (self.is_by_gptqmodel, bits) {
                (false, _) => Wrapping::Unknown,
                (true, 3) => Wrapping::Fields,
                (true, _) => Wrapping::Words(word_bytes),
            },
        }
    }
}

/// The settings of layers of a format.
fn settings_of(format: Format) -> LayerSettings {
    LayerSettings {
        bits: format.bits(),
        group_size: format.group_size(),
        symmetric: match format.grid() {
            Grid::Symmetric => Symmetry::Yes,
            _ => Symmetry::No,
        },
        desc_act: false,
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

/// The layers whose formats a GPTQ checkpoint of this version cannot hold, whatever their values.
pub(super) fn refusals<'a>(
    layers: impl Iterator<Item = &'a PackedLayer>,
    version: GptqVersion,
) -> Refusals {
    let reasons = layers.map(|layer| {
        let reasons = reasons_against_format(layer, version);
        (layer.path.clone(), reasons.join("; "))
    });
    reasons.filter(|(_, reasons)| !reasons.is_empty()).collect()
}

/// The reasons why a GPTQ checkpoint cannot hold weights of a format.
fn reasons_against_format(layer: &PackedLayer, version: GptqVersion) -> Vec<String> {
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
    if format.grid() == Grid::Affine && version == GptqVersion::V1 {
        reasons.push(format!(
            "is {format}, and GPTQModel loads such layers of version 1 from no other program"
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
pub(super) fn reasons_against_values(weight: &QuantTensor) -> Vec<String> {
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
        if fractional > 0 {
            reasons.push(format!("has {fractional} zeros that are not whole"));
        }
        if outside > 0 {
            reasons.push(format!("has {outside} zeros outside of 0 to {highest}"));
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
        let Some(qweight) = self.packed_tensor(tensors, path) else {
            return Ok(None);
        };
        let layer = self.packed_layer(path, &qweight)?;
        let grid = match layer.symmetric {
            Symmetry::Yes => Grid::Symmetric,
            Symmetry::No | Symmetry::Unstated => Grid::Affine,
        };
        let format = Format::new(layer.bits, layer.group_size, grid);
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
        let layer = self.packed_layer(path, &qweight)?;
        let ([d_in, d_out], bits) = (dims, layer.bits);
        let affine = Format::new(bits, layer.group_size, Grid::Affine).map_err(&quant)?;
        let layout = affine.layout(dims).map_err(&quant)?;
        for (n, what) in [(d_in, "inputs"), (d_out, "outputs")] {
            if !n.checked_mul(bits).is_some_and(|n| n.is_multiple_of(32)) {
                let problem = format!("{n} {what} of {bits} bits do not fill words of 32");
                return Err(tensors.refuse(&qweight, problem));
            }
        }
        let stored = tensors.stored(&qweight)?;
        let checked = check_shape(&stored, [d_in * bits / 32, d_out], 0);
        let columns = checked.and_then(|()| column_words(&stored));
        let mut columns = columns.map_err(|problem| tensors.refuse(&qweight, problem))?;
        let grid @ [n_groups, _] = layout.grid_shape();
        let scales = tensors.floats(&format!("{path}.scales"), grid)?;
        let qzeros_name = format!("{path}.qzeros");
        let stored = tensors.stored(&qzeros_name)?;
        let checked = check_shape(&stored, [n_groups, d_out * bits / 32], 1);
        let words = checked.and_then(|()| Ok((row_words(&stored)?, word_bytes(&stored)?)));
        let words = words.map_err(|problem| tensors.refuse(&qzeros_name, problem));
        let (qzeros, word_bytes) = words?;
        let zeros = self.zeros(bits, word_bytes).unpack(&qzeros, n_groups);
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
        } else if layer.desc_act {
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
        if let (Symmetry::Yes, Some(zero)) = (layer.symmetric, other) {
            let problem = format!(
                "has a zero-point of {zero}, but `sym` is true, which makes all of them {middle}: `checkpoint_format` is the wrong one, or `sym`"
            );
            return Err(tensors.refuse(&qzeros_name, problem));
        }
        let (format, zeros) = if layer.symmetric != Symmetry::No && other.is_none() {
            let format = Format::new(bits, layer.group_size, Grid::Symmetric);
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
        let (bits, [d_in, d_out]) = (weight.format().bits(), weight.dims());
        let (grid, group_size) = (weight.layout().grid_shape(), weight.layout().group_size());
        let qweight = move || match weight.input_order() {
            None => weight.columns(),
            Some(_) => pack(&weight.codes(), d_out, bits),
        };
        let zeros = match weight.zeros() {
            Some(zeros) => read(zeros).into_iter().map(|zero| zero as u8).collect(),
            None => vec![1 << (bits - 1); grid[0] * d_out],
        };
        let qzeros = self.zeros(bits, 4).pack(&zeros, grid);
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
        config::in_json(self.layers, &self.rules, self.version, self.lm_head)
    }

    fn config_file(&self) -> Option<&'static str> {
        Some(CONFIG_FILE)
    }
}
