//! The tile adapter: the added matrix is constant over tiles of `p_in × p_out` weights.
//!
//! `y = x W + c · repeat(pool(x) F)`, where `pool` sums each `p_in` inputs, `repeat` gives each output
//! to `p_out` in a row, and `F`, `[d_in / p_in, d_out / p_out]`, is a product of two factors or one
//! matrix. On an affine grid `w = s (q - z)` whose groups lie inside tiles, the sum is on the grid
//! again, with the same codes and scales: `z' = z - c F / s`. So it merges; the zeros are then
//! fractions, which a format with integer zeros (GPTQ) does not hold.
//!
//! | method | pool | repeat | `F` | source |
//! |---|---|---|---|---|
//! | QA-LoRA | a group | 1 | `A B`, rank `r` | Xu et al. 2023, arXiv:2309.14717 |
//! | Q-BaRA | 2 | 2 | `A B`, as many parameters as LoRA of rank `r`, so rank `2 r` | Q-BLoRA's published code |
//! | QA-HiRA | a group | 1 | one matrix | ours, see below |
//! | QA-BLoRA | a group | 2 | `A B`, rank `r` | ours, see below |
//!
//! The published code of QA-HiRA pools 4 inputs, repeats 8 outputs, and has neither a quantized base
//! nor a merge nor an initialization that its own reset accepts. Tiles of 4 × 8 do not merge into
//! groups that run along the inputs, as those of all formats here and of GPTQ do; tiles of 32 × 1
//! have as many parameters and do. The method here therefore pools whole groups, is initialized to
//! zero, and merges by the rule above. Of QA-BLoRA only the abstract is public: pooled inputs and
//! repeated outputs aligned to blocks. `Tile::with_pool` and `Tile::with_repeat` take other tiles.
//!
//! `B` and the one matrix are initialized to zero. `A` is uniform: in QA-LoRA and QA-BLoRA by
//! Xavier's rule, in Q-BaRA in `±1 / √(d_in / 2)`, as in LoRA.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Tensor};
use quant_core::QuantTensor;
use serde::{Deserialize, Serialize};

use super::checks::{check_count, check_dtype, check_positive, check_product, check_shape};
use super::dropout::Dropout;
use super::hf::HfLayer;
use super::lora::hf_layer;
use super::tensors::{Source, bounded, floats, stored, uniform};
use super::{Adapter, AdapterOps, Method, Settings};
use crate::{Error, Exactness, Linear, Result, Targets, Weight, learning_rate};
use tensor_files::LazyTensor;

#[cfg(test)]
mod tests;
mod zeros;

use zeros::{groups_outside, of_groups};

/// The published methods that the tile adapter generalizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TileMethod {
    /// Pooled groups of inputs; a product of low rank.
    QaLora,
    /// Pairs of inputs and of outputs; a product of twice the rank, over any base.
    QBara,
    /// Pooled groups of inputs; one matrix.
    QaHira,
    /// Pooled groups of inputs and pairs of outputs; a product of low rank.
    QaBlora,
}

impl TileMethod {
    /// The name in the literature.
    pub fn name(self) -> &'static str {
        match self {
            TileMethod::QaLora => "QA-LoRA",
            TileMethod::QBara => "Q-BaRA",
            TileMethod::QaHira => "QA-HiRA",
            TileMethod::QaBlora => "QA-BLoRA",
        }
    }

    /// Whether it refuses a packed weight that it cannot merge into.
    fn merges(self) -> bool {
        !matches!(self, TileMethod::QBara)
    }
}

/// The pooling of inputs: three factors of one sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The sum, as in the paper of QA-LoRA.
    Sum,
    /// The mean, as in its code: gradients are smaller by the size of a tile.
    Mean,
    /// The mean times the number of pools of the layer, as in PEFT's `use_qalora`.
    Peft,
}

impl Pooling {
    /// The factor of the sum over a pool.
    fn factor(self, pool: usize, n_pools: usize) -> f32 {
        match self {
            Pooling::Sum => 1.0,
            Pooling::Mean => 1.0 / pool as f32,
            Pooling::Peft => n_pools as f32 / pool as f32,
        }
    }
}

/// Trains a matrix that is constant over tiles of each layer's weight.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use peft::{Error, Linear, Method, Tile, Weight};
/// use quant_core::Rtn;
///
/// let weight = Tensor::random([64, 32], Distribution::Default, &Device::flex());
/// let mut linear = Linear::new(Weight::frozen(weight), None);
/// linear.quantize("proj", &Rtn::new().with_bits(4).with_group_size(32), None)?;
/// let adapter = Tile::qa_lora(1).init("proj", &linear)?;
/// assert_eq!(burn::module::Module::num_params(&adapter), 2 + 32);
/// // Groups of 32 inputs do not lie inside tiles of 16.
/// let error = Tile::qa_lora(1).with_pool(16).init("proj", &linear).unwrap_err();
/// assert!(matches!(error, Error::Tiles { .. }));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    method: TileMethod,
    pool: Option<usize>,
    repeat: usize,
    /// The rank of the product; none for one matrix.
    rank: Option<usize>,
    alpha: f32,
    pooling: Pooling,
    dropout: f32,
    targets: Targets,
    seed: u64,
}

impl Tile {
    fn new(method: TileMethod, rank: Option<usize>) -> Self {
        Self {
            method,
            pool: None,
            repeat: 1,
            rank,
            alpha: rank.unwrap_or(1) as f32,
            pooling: Pooling::Sum,
            dropout: 0.0,
            targets: Targets::All,
            seed: 0,
        }
    }

    /// QA-LoRA of this rank on every linear layer: groups of the base are pooled, `σ = 1`.
    pub fn qa_lora(rank: usize) -> Self {
        Self::new(TileMethod::QaLora, Some(rank))
    }

    /// Q-BaRA with as many parameters as LoRA of this rank, on every linear layer: pairs of inputs
    /// are averaged, each output is given to two, `σ = 1`.
    pub fn q_bara(rank: usize) -> Self {
        Self {
            pool: Some(2),
            repeat: 2,
            pooling: Pooling::Mean,
            ..Self::new(TileMethod::QBara, Some(rank))
        }
    }

    /// QA-HiRA on every linear layer: one parameter for each group and output.
    pub fn qa_hira() -> Self {
        Self::new(TileMethod::QaHira, None)
    }

    /// QA-BLoRA of this rank on every linear layer: groups of the base are pooled, each output is
    /// given to two, `σ = 1`.
    pub fn qa_blora(rank: usize) -> Self {
        Self {
            repeat: 2,
            ..Self::new(TileMethod::QaBlora, Some(rank))
        }
    }

    /// Sets the number of inputs of a tile, by default that of a group of the base.
    ///
    /// To merge, each group must lie inside a tile.
    pub fn with_pool(mut self, inputs: usize) -> Self {
        self.pool = Some(inputs);
        self
    }

    /// Sets the number of outputs of a tile.
    pub fn with_repeat(mut self, outputs: usize) -> Self {
        self.repeat = outputs;
        self
    }

    /// Sets `α`: the added matrix is multiplied by `σ = α / r`, with the rank that the method was
    /// given, and 1 for the one matrix of QA-HiRA.
    pub fn with_alpha(mut self, alpha: f32) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets the pooling of inputs.
    pub fn with_pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = pooling;
        self
    }

    /// Sets the probability with which pooled inputs are dropped while [`fit`](crate::fit()) trains.
    pub fn with_dropout(mut self, probability: f32) -> Self {
        self.dropout = probability;
        self
    }

    /// Sets the layers to adapt.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }

    /// Sets the seed from which `A` is drawn, together with the path of the layer.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The rank of the product of a layer with so many pools and outputs before they are repeated.
    fn rank_of(
        &self,
        path: &str,
        [d_in, d_out]: [usize; 2],
        [n_pools, n_out]: [usize; 2],
    ) -> Result<Option<usize>> {
        let Some(asked) = self.rank else {
            return Ok(None);
        };
        let rank = match self.method {
            // As many parameters as LoRA.
            TileMethod::QBara => asked.saturating_mul(d_in + d_out) / (n_pools + n_out),
            _ => asked,
        };
        if rank <= n_pools.min(n_out) {
            return Ok(Some(rank));
        }
        Err(Error::Tiles {
            method: self.method.name(),
            path: path.into(),
            problem: format!(
                "rank {asked} asks for a product of rank {rank}, which {n_pools} pools and {n_out} outputs do not have"
            ),
        })
    }
}

impl Method for Tile {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter> {
        let weight = linear.weight();
        check_dtype(path, weight)?;
        let name = self.method.name();
        let pool = match (self.pool, weight) {
            (Some(pool), _) => pool,
            (None, Weight::Quant(weight)) => weight.layout().group_size(),
            (None, Weight::Dense(_)) => {
                return Err(Error::NeedsQuantized {
                    method: name,
                    path: path.into(),
                });
            }
        };
        let dims = weight.dims();
        let settings = TileSettings {
            tiles: self.method,
            pool,
            repeat: self.repeat,
            pooling: self.pooling,
            alpha: self.alpha,
            rank: self.rank.unwrap_or(1),
            dropout: self.dropout,
        };
        settings.check()?;
        let n_tiles = settings.n_tiles(path, dims)?;
        if let Weight::Quant(weight) = weight
            && self.method.merges()
            && let Some(problem) = groups_outside(weight, settings.pool)
        {
            return Err(Error::Tiles {
                method: name,
                path: path.into(),
                problem,
            });
        }
        let device = weight.device();
        let zeros =
            |dims: [usize; 2]| Param::from_tensor(Tensor::zeros(dims, (&device, DType::F32)));
        let factor = match self.rank_of(path, dims, n_tiles)? {
            Some(rank) => {
                let bound = match self.method {
                    TileMethod::QBara => 1.0 / (n_tiles[0] as f32).sqrt(),
                    _ => (6.0 / (n_tiles[0] + rank) as f32).sqrt(),
                };
                Factor::Product(Product {
                    a: Param::from_tensor(uniform(
                        self.seed,
                        path,
                        [n_tiles[0], rank],
                        bound,
                        &device,
                    )),
                    b: zeros([rank, n_tiles[1]]),
                })
            }
            None => Factor::Matrix(zeros(n_tiles)),
        };
        Ok(Adapter::Tile(TileAdapter::new(factor, settings)))
    }

    fn learning_rate(&self, hidden_size: usize) -> f64 {
        match (self.rank, self.pooling) {
            (Some(_), Pooling::Sum) => learning_rate::of_pooled_factors(hidden_size, self.alpha),
            (Some(_), _) => learning_rate::of_factors(hidden_size),
            (None, _) => learning_rate::of_elements(hidden_size),
        }
    }
}

/// The matrix that is trained beside one layer's weight, with one value for each tile.
#[derive(Module, Debug)]
pub struct TileAdapter {
    factor: Factor,
    #[module(skip)]
    settings: TileSettings,
    #[module(skip)]
    dropout: Dropout,
}

/// The matrix `F`.
#[derive(Module, Debug)]
enum Factor {
    Product(Product),
    Matrix(Param<Tensor<2>>),
}

#[derive(Module, Debug)]
struct Product {
    /// `[d_in / pool, r]`.
    a: Param<Tensor<2>>,
    /// `[r, d_out / repeat]`.
    b: Param<Tensor<2>>,
}

/// The settings of a [`TileAdapter`] in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TileSettings {
    pub(crate) tiles: TileMethod,
    pub(crate) pool: usize,
    pub(crate) repeat: usize,
    pub(crate) pooling: Pooling,
    pub(crate) alpha: f32,
    /// The divisor of `α`.
    pub(crate) rank: usize,
    pub(crate) dropout: f32,
}

impl TileSettings {
    fn check(&self) -> Result<()> {
        check_count("rank", self.rank)?;
        check_count("pool", self.pool)?;
        check_count("repeat", self.repeat)?;
        check_positive("alpha", self.alpha)?;
        Dropout::new(self.dropout).check()
    }

    /// The numbers of tiles along inputs and outputs of the layer at `path`.
    fn n_tiles(&self, path: &str, dims: [usize; 2]) -> Result<[usize; 2]> {
        let tile = [self.pool, self.repeat];
        if dims[0].is_multiple_of(tile[0]) && dims[1].is_multiple_of(tile[1]) {
            return Ok([dims[0] / tile[0], dims[1] / tile[1]]);
        }
        Err(Error::Tiles {
            method: self.tiles.name(),
            path: path.into(),
            problem: format!("tiles of {tile:?} do not divide its weight, {dims:?}"),
        })
    }
}

impl TileAdapter {
    fn new(factor: Factor, settings: TileSettings) -> Self {
        let dropout = Dropout::new(settings.dropout);
        Self {
            factor,
            settings,
            dropout,
        }
    }

    /// An adapter of these factors, `[d_in / pool, r]` and `[r, d_out / repeat]`.
    pub(crate) fn of_product(
        a: Param<Tensor<2>>,
        b: Param<Tensor<2>>,
        settings: TileSettings,
    ) -> Result<Self> {
        settings.check()?;
        Ok(Self::new(Factor::Product(Product { a, b }), settings))
    }

    /// The published method.
    pub fn method(&self) -> TileMethod {
        self.settings.tiles
    }

    /// The numbers of inputs and outputs of a tile.
    pub fn tile(&self) -> [usize; 2] {
        [self.settings.pool, self.settings.repeat]
    }

    /// The factors `[d_in / pool, r]` and `[r, d_out / repeat]`, unless it is one matrix.
    pub fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        match &self.factor {
            Factor::Product(product) => Some((product.a.val(), product.b.val())),
            Factor::Matrix(_) => None,
        }
    }

    /// The matrix `F`, `[d_in / pool, d_out / repeat]`.
    pub fn matrix(&self) -> Tensor<2> {
        match &self.factor {
            Factor::Product(product) => product.a.val().matmul(product.b.val()),
            Factor::Matrix(matrix) => matrix.val(),
        }
    }

    /// The matrix `F` row by row, computed in `f64`.
    fn matrix_f64(&self) -> Vec<f64> {
        let widened = |values: Tensor<2>| floats(values).into_iter().map(f64::from);
        let product = match &self.factor {
            Factor::Matrix(matrix) => return widened(matrix.val()).collect(),
            Factor::Product(product) => product,
        };
        let a: Vec<f64> = widened(product.a.val()).collect();
        let b: Vec<f64> = widened(product.b.val()).collect();
        let [_, n_out] = self.n_tiles();
        let rank = b.len() / n_out;
        let mut matrix = vec![0.0; a.len() / rank * n_out];
        for (row, a) in matrix.chunks_exact_mut(n_out).zip(a.chunks_exact(rank)) {
            for (b, a) in b.chunks_exact(n_out).zip(a) {
                row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
        }
        matrix
    }

    /// The numbers of tiles along inputs and outputs.
    fn n_tiles(&self) -> [usize; 2] {
        match &self.factor {
            Factor::Product(product) => [product.a.val().dims()[0], product.b.val().dims()[1]],
            Factor::Matrix(matrix) => matrix.val().dims(),
        }
    }

    /// The factor `c` of the product of pooled inputs with `F`.
    pub fn scale(&self) -> f32 {
        let TileSettings {
            pool,
            pooling,
            alpha,
            rank,
            ..
        } = self.settings;
        alpha / rank as f32 * pooling.factor(pool, self.n_tiles()[0])
    }

    pub(super) fn read(settings: TileSettings, path: &str, source: &mut Source) -> Result<Self> {
        settings.check()?;
        let factor = if settings.tiles == TileMethod::QaHira {
            Factor::Matrix(source.param(&format!("{path}.matrix"))?)
        } else {
            let [a, b] = source.factors(path)?;
            let rank = a.val().dims()[1];
            if settings.tiles != TileMethod::QBara && rank != settings.rank {
                let problem = format!("has rank {rank}, its settings say {}", settings.rank);
                return Err(source.file.refuse(&format!("{path}.a"), problem).into());
            }
            Factor::Product(Product { a, b })
        };
        Ok(Self::new(factor, settings))
    }
}

impl AdapterOps for TileAdapter {
    fn name(&self) -> &'static str {
        self.method().name()
    }

    fn seed_dropout(&mut self, path: &str, seed: Option<u64>) {
        self.dropout.seed(path, seed);
    }

    /// `B`.
    fn fast_params(&self) -> Vec<ParamId> {
        match &self.factor {
            Factor::Product(product) => vec![product.b.id],
            Factor::Matrix(_) => Vec::new(),
        }
    }

    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2> {
        let ([pool, repeat], [n_pools, n_out]) = (self.tile(), self.n_tiles());
        let rows = x.dims()[0];
        // Sums of many inputs, of which there are few.
        let pooled = x.clone().reshape([rows, n_pools, pool]).cast(DType::F32);
        let pooled = pooled.sum_dim(2).reshape([rows, n_pools]);
        let pooled = self.dropout.apply(pooled) * self.scale();
        let low = match &self.factor {
            Factor::Product(product) => pooled.matmul(product.a.val()).matmul(product.b.val()),
            Factor::Matrix(matrix) => pooled.matmul(matrix.val()),
        };
        let added = match repeat {
            1 => low,
            _ => low
                .reshape([rows, n_out, 1])
                .expand([rows, n_out, repeat])
                .reshape([rows, n_out * repeat]),
        };
        let added = added.cast(x.dtype());
        weight.matmul(x) + added
    }

    fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        let weight = linear.weight();
        check_dtype(path, weight)?;
        let n_tiles = self.settings.n_tiles(path, weight.dims())?;
        check_shape(path, n_tiles, self.n_tiles())
    }

    fn check_values(&self, path: &str, _: &Weight) -> Result<()> {
        match self.factors() {
            Some((a, b)) => check_product(self.name(), path, [a, b], self.scale()),
            None => Ok(()),
        }
    }

    fn on_codes(&self, path: &str, weight: &QuantTensor) -> Result<(QuantTensor, Exactness)> {
        if let Some(reason) = groups_outside(weight, self.settings.pool) {
            return Err(Error::MergeIntoPacked {
                method: self.name(),
                path: path.into(),
                reason,
            });
        }
        let scale = f64::from(self.scale());
        let added: Vec<f64> = self.matrix_f64().into_iter().map(|f| scale * f).collect();
        let added = of_groups(weight, self.tile(), &added);
        zeros::add(weight, &added).map_err(|source| Error::Quant {
            path: path.into(),
            source,
        })
    }

    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        let ([pool, repeat], [n_pools, n_out]) = (self.tile(), self.n_tiles());
        let spread = |matrix: Tensor<2>| {
            matrix
                .reshape([n_pools, 1, n_out, 1])
                .expand([n_pools, pool, n_out, repeat])
                .reshape([n_pools * pool, n_out * repeat])
        };
        let scale = self.scale();
        let (magnitudes, rank) = match &self.factor {
            Factor::Product(product) => {
                let (a, b) = (product.a.val().detach(), product.b.val().detach());
                let rank = a.dims()[1];
                (a.abs().matmul(b.abs()), rank)
            }
            Factor::Matrix(matrix) => (matrix.val().detach().abs(), 1),
        };
        let w = weight.to_dense();
        let merged = w.clone() + spread(self.matrix().detach() * scale);
        let magnitudes = w.abs() + spread(magnitudes * scale);
        bounded(merged, magnitudes, rank + 2)
    }

    fn settings(&self) -> Settings {
        Settings::Tile(self.settings.clone())
    }

    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        match &self.factor {
            Factor::Product(product) => vec![("a", stored(&product.a)), ("b", stored(&product.b))],
            Factor::Matrix(matrix) => vec![("matrix", stored(matrix))],
        }
    }

    fn to_hf(&self) -> Result<HfLayer<'_>, String> {
        let TileSettings {
            tiles,
            pool,
            repeat,
            pooling,
            alpha,
            rank,
            dropout,
        } = self.settings;
        let factors = match self.factors() {
            Some((a, b)) if tiles == TileMethod::QaLora && repeat == 1 => [a, b],
            _ => return Err("PEFT has no such tiles; use `Adapters::save`".into()),
        };
        if pool < 2 {
            return Err("in PEFT's files, pools of one input are those of LoRA".into());
        }
        if pooling != Pooling::Peft {
            return Err("PEFT knows no pooling but `Pooling::Peft`".into());
        }
        let switches = [
            ("use_dora", false),
            ("use_qalora", true),
            ("use_rslora", false),
        ];
        Ok(hf_layer(rank, alpha, dropout, pool, switches, factors))
    }
}
