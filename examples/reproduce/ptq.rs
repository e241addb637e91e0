//! Quantizers: every one at every width and group size, with the same calibration.

use std::slice;

use examples::arguments::GroupSize;
use examples::outcome::Result;
use examples::table::number;
use quant_core::{GroupRange, NormalFloat, Optq, Order, Quantizer, Rtn};

use crate::claim::{Claim, Pair};
use crate::lab::{Lab, Quantized};
use crate::report::{self, Bar, Section, Table};

/// A quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Rtn,
    Clip,
    Nf,
    Optq,
    ActOrder,
    Gptaq,
}

/// All quantizers.
pub(crate) const NAMES: [Name; 6] = [
    Name::Rtn,
    Name::Clip,
    Name::Nf,
    Name::Optq,
    Name::ActOrder,
    Name::Gptaq,
];

impl Name {
    fn key(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Clip => "clip",
            Self::Nf => "nf",
            Self::Optq => "optq",
            Self::ActOrder => "optq-act-order",
            Self::Gptaq => "gptaq",
        }
    }

    /// Its name in a table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Rtn => "RTN",
            Self::Clip => "RTN, clip search",
            Self::Nf => "NF",
            Self::Optq => "OPTQ, natural order",
            Self::ActOrder => "OPTQ, act-order",
            Self::Gptaq => "GPTAQ, natural order",
        }
    }

    /// Returns the quantizer.
    pub(crate) fn quantizer(self, bits: usize, GroupSize(size): GroupSize) -> Box<dyn Quantizer> {
        let rtn = Rtn::new().with_bits(bits).with_group_size(size);
        let optq = Optq::new().with_bits(bits).with_group_size(size);
        let natural = optq.with_order(Order::Natural);
        match self {
            Self::Rtn => Box::new(rtn),
            Self::Clip => Box::new(rtn.with_range(GroupRange::Clipped)),
            Self::Nf => Box::new(NormalFloat::new().with_bits(bits).with_block_size(size)),
            Self::Optq => Box::new(natural),
            Self::ActOrder => Box::new(optq.with_order(Order::Descending)),
            Self::Gptaq => Box::new(natural.with_drift(0.25)),
        }
    }

    /// Its cell.
    pub(crate) fn cell(self, lab: &Lab, bits: usize, size: GroupSize) -> Result<Quantized> {
        let name = format!("{}-{bits}-{size}", self.key());
        let quantizer = self.quantizer(bits, size);
        lab.based(&name, &*quantizer, None, |model| {
            lab.quantize(model, &*quantizer)
        })
    }
}

/// A finished cell with its place in the table.
struct Cell {
    name: Name,
    bits: usize,
    size: GroupSize,
    found: Quantized,
}

/// Runs the experiment.
pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let dense = lab.dense()?;
    let mut cells = Vec::new();
    for &bits in &lab.args.widths() {
        for &size in &lab.args.group_size {
            for name in NAMES {
                let found = name.cell(lab, bits, size)?;
                cells.push(Cell {
                    name,
                    bits,
                    size,
                    found,
                });
            }
        }
    }
    let mut table = Table::new(&[
        "bits",
        "group",
        "quantizer",
        "held out",
        "other text",
        "bytes of layers",
        "seconds",
        "peak MiB",
    ]);
    let mut bars = Vec::new();
    for cell in &cells {
        let Quantized {
            losses,
            n_bytes,
            seconds,
            peak_bytes,
        } = &cell.found;
        let losses = slice::from_ref(losses);
        let [held_out, other] = report::cells(losses);
        table.row([
            cell.bits.to_string(),
            cell.size.to_string(),
            cell.name.title().into(),
            held_out,
            other,
            n_bytes.to_string(),
            format!("{seconds:.0}"),
            peak_bytes.map_or("-".into(), |n| (n >> 20).to_string()),
        ]);
        let label = format!("{} bits, {}: {}", cell.bits, cell.size, cell.name.title());
        bars.push(Bar::new(label, losses));
    }
    Ok(Section {
        title: "Quantizers".into(),
        about: format!(
            "Perplexities; the dense model has {:.3} on held-out text and {} on the other text. Calibrated on {} windows of {} tokens.",
            dense.perplexity(),
            number(dense.drift(), 3),
            lab.args.samples,
            lab.args.seq_len,
        ),
        tables: vec![table],
        claims: claims(&cells)?,
        dense,
        bars,
    })
}

const OPTQ: &str = "Frantar et al. 2023, arXiv:2210.17323";

fn claims(cells: &[Cell]) -> Result<Vec<Claim>> {
    let of_both = |lower: Name, higher: Name, is_in: fn(usize) -> bool| {
        let firsts = cells
            .iter()
            .filter(move |cell| cell.name == lower && is_in(cell.bits));
        let pairs = firsts.filter_map(move |first| {
            let mut others = cells.iter();
            let is_beside =
                |of: &&Cell| of.name == higher && (of.bits, of.size) == (first.bits, first.size);
            let second = others.find(is_beside)?;
            Some(Pair {
                name: format!("{} bits, group {}", first.bits, first.size),
                lower: slice::from_ref(&first.found.losses),
                higher: slice::from_ref(&second.found.losses),
            })
        });
        pairs.collect::<Vec<_>>()
    };
    let few = |bits| bits < 4;
    let all = |_| true;
    let mut wider = Vec::new();
    let mut smaller = Vec::new();
    for cell in cells {
        let same = cells.iter().filter(|of| of.name == cell.name);
        for other in same {
            let pair = |name| Pair {
                name,
                lower: slice::from_ref(&cell.found.losses),
                higher: slice::from_ref(&other.found.losses),
            };
            let title = cell.name.title();
            let between = |of: &Cell| other.bits < of.bits && of.bits < cell.bits;
            let is_next = cell.bits > other.bits && !cells.iter().any(between);
            if cell.size == other.size && is_next {
                let (more, fewer) = (cell.bits, other.bits);
                wider.push(pair(format!(
                    "{title}, group {}: {more} and {fewer} bits",
                    cell.size
                )));
            }
            // All weights of an output are the largest group.
            let size = |of: &Cell| of.size.0.unwrap_or(usize::MAX);
            if cell.bits == other.bits && size(cell) < size(other) {
                let sizes = format!("groups of {} and {}", cell.size, other.size);
                smaller.push(pair(format!("{title}, {} bits: {sizes}", cell.bits)));
            }
        }
    }
    let mut claims = vec![
        Claim::lower(
            "OPTQ's perplexity is below RTN's at 3 and 2 bits, inputs in natural order",
            OPTQ,
            &of_both(Name::Optq, Name::Rtn, few),
        )?,
        Claim::lower(
            "OPTQ's perplexity is below RTN's at 3 and 2 bits, inputs in descending order",
            OPTQ,
            &of_both(Name::ActOrder, Name::Rtn, few),
        )?,
        Claim::lower(
            "Quantizing inputs in descending order (act-order) improves OPTQ",
            "the published code of OPTQ",
            &of_both(Name::ActOrder, Name::Optq, all),
        )?,
        Claim::lower(
            "Correcting for the drift of the inputs improves OPTQ (GPTAQ)",
            "Li et al. 2025, arXiv:2504.02692",
            &of_both(Name::Gptaq, Name::Optq, all),
        )?,
        Claim::lower(
            "A search for the range improves RTN at 3 bits and less",
            "the published code of OPTQ",
            &of_both(Name::Clip, Name::Rtn, few),
        )?,
        Claim::lower("More bits lower the perplexity", OPTQ, &wider)?,
    ];
    if !smaller.is_empty() {
        claims.push(Claim::lower(
            "Smaller groups lower the perplexity",
            OPTQ,
            &smaller,
        )?);
    }
    Ok(claims)
}
