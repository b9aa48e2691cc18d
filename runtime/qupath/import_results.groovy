/*
 * Imports results of histo-infer into QuPath 0.5 or newer: outlines, tissue, pixel size and label maps.
 *
 * Open an image or a project, then this file in Automate > Script editor, and press Run. With a project open, all its
 * images that have a result are done and saved; otherwise the open image is. Without a window:
 *
 *     QuPath script --project=project.qpproj --args=FOLDER import-qupath.groovy
 *
 * Running it again replaces what it imported before, and nothing else.
 */
import qupath.lib.images.servers.ImageServerProvider
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import qupath.lib.scripting.QP

import java.awt.geom.AffineTransform
import java.awt.image.BufferedImage
import java.util.zip.GZIPInputStream

// The folder that histo-infer was given as --out, or the folder of one slide in it; --args=FOLDER takes precedence.
def results = new File('@RESULTS@')
def withTissue = true       // the outline of the tissue that was analysed, as locked annotations
def withLabelMaps = true    // label maps as further images of the project

def mark = 'HistoStream'    // key of the metadata of imported objects
def maxMppDifference = 0.01 // relative; a larger one is reported

def given = []
try {
    given = args as List
} catch (MissingPropertyException ignored) {
    // the script editor has no arguments
}
if (given) {
    results = new File(given[0] as String)
}

def say = { String text -> println "HistoStream: ${text}" }
def lastPart = { String path -> path.replace('\\', '/').replaceAll('/+$', '').tokenize('/').with { it ? it.last() : '' } }

/** One folder of results: its record, and the name and path of its slide. */
def readResult = { File folder ->
    def record = GsonTools.getInstance().fromJson(new File(folder, 'run.json').getText('UTF-8'), Map)
    def slide = record.slide
    def source = (slide.source ?: slide.path ?: '') as String
    [folder: folder, slide: slide, options: record.options ?: [:], source: source.replace('\\', '/'), name: lastPart(source)]
}

/** The results of an image: those of its path, else those of its file name, or of its folder's name for DICOM. */
def resultsOf = { server, all ->
    def paths = server.getURIs().collect { (it.getPath() ?: it.toString()).replace('\\', '/') }
    def exact = all.findAll { result -> paths.any { it == result.source || it == "/${result.source}".toString() } }
    if (exact) {
        return exact
    }
    def names = paths.collectMany { [lastPart(it), lastPart(it.contains('/') ? it.substring(0, it.lastIndexOf('/')) : '')] }
    all.findAll { it.name && names.contains(it.name) }
}

/** What to add to coordinates of the files to have QuPath's, as [x, y]; null if the image has another size. */
def shiftOf = { server, result ->
    def slide = result.slide
    def fits = { double width, double height ->
        Math.abs(width - server.getWidth()) <= slide.downsample + 1 && Math.abs(height - server.getHeight()) <= slide.downsample + 1
    }
    def bounds = slide.bounds
    def inOpenSlide = bounds && result.options.coordinates == 'openslide'
    if (fits(slide.width * slide.downsample, slide.height * slide.downsample)) {
        return inOpenSlide ? [-bounds.x, -bounds.y] : [0, 0]
    }
    // An image that was opened with --no-crop shows all that OpenSlide does.
    if (bounds && server.getWidth() >= bounds.x + bounds.width && server.getHeight() >= bounds.y + bounds.height) {
        return inOpenSlide ? [0, 0] : [bounds.x, bounds.y]
    }
    return null
}

/** The objects of a GeoJSON file, moved and marked. */
def readObjects = { File file, shift ->
    def objects = file.withInputStream { stream ->
        PathIO.readObjectsFromGeoJSON(file.name.endsWith('.gz') ? new GZIPInputStream(stream) : stream)
    }
    if (shift != [0, 0]) {
        def moved = AffineTransform.getTranslateInstance(shift[0] as double, shift[1] as double)
        objects = objects.collect { PathObjectTools.transformObject(it, moved, true) }
    }
    objects.each { it.getMetadata().put(mark, file.name) }
    objects
}

/** Imports a result into an image; returns whether anything was changed. */
def importResult = { imageData, result ->
    def server = imageData.getServer()
    def name = server.getMetadata().getName()
    def shift = shiftOf(server, result)
    if (shift == null) {
        say "${name}: it has ${server.getWidth()} x ${server.getHeight()} px, and ${result.folder} is of another image; left alone"
        return false
    }
    def mpp = result.slide.result_mpp / result.slide.downsample
    def calibration = server.getPixelCalibration()
    if (!calibration.hasPixelSizeMicrons()) {
        QP.setPixelSizeMicrons(imageData, mpp, mpp, null)
        say "${name}: the pixel size is set to ${mpp} um"
    } else if (Math.abs(calibration.getAveragedPixelSizeMicrons() / mpp - 1) > maxMppDifference) {
        say "${name}: QuPath has ${calibration.getAveragedPixelSizeMicrons()} um per pixel, histo-infer ran with ${mpp}: areas differ"
    }
    def hierarchy = imageData.getHierarchy()
    def former = hierarchy.getAllObjects(false).findAll { it.getMetadata().containsKey(mark) }
    hierarchy.removeObjects(former, true)
    def objects = []
    def outlines = new File(result.folder, 'objects.geojson.gz')
    if (outlines.isFile()) {
        objects.addAll(readObjects(outlines, shift))
    } else {
        say "${name}: no objects.geojson.gz in ${result.folder}; run histo-infer with --geojson"
    }
    def tissue = new File(result.folder, 'tissue.geojson')
    if (withTissue && tissue.isFile()) {
        def regions = readObjects(tissue, shift)
        regions.each { it.setLocked(true) }
        objects.addAll(regions)
    }
    hierarchy.addObjects(objects)
    say "${name}: ${objects.size()} objects imported, ${former.size()} of before removed"
    return true
}

/** Adds the label map of a result to a project as an image, once. */
def addLabelMap = { project, result ->
    def file = ['labels.rgb.ome.tif', 'labels.ome.tif', 'labels.tif'].collect { new File(result.folder, it) }.find { it.isFile() }
    def title = "${result.folder.name} (labels)".toString()
    if (file == null || project.getImageList().any { it.getImageName() == title }) {
        return
    }
    def support = ImageServerProvider.getPreferredUriImageSupport(BufferedImage, file.toURI().toString())
    if (support == null || support.getBuilders().isEmpty()) {
        say "${file}: QuPath does not open it; run histo-infer with --rasters ome-tiff-rgb"
        return
    }
    project.addImage(support.getBuilders().get(0)).setImageName(title)
}

def folders = new File(results, 'run.json').isFile() ? [results] : (results.listFiles() ?: []).findAll { new File(it, 'run.json').isFile() }
def all = folders.sort { it.name }.collect { readResult(it) }
if (!all) {
    say "${results}: no results there; write the folder of --out into the script"
    return
}

def project = QP.getProject()
def opened = QP.getCurrentImageData()
def used = []
/** Finds the one result of an image and imports it. */
def importInto = { imageData ->
    def found = resultsOf(imageData.getServer(), all)
    def name = imageData.getServer().getMetadata().getName()
    if (found.size() != 1) {
        say(found ? "${name}: several results, ${found*.folder*.name}; name the folder of one" : "${name}: no result")
        return false
    }
    def done = importResult(imageData, found[0])
    if (done) {
        used << found[0]
    }
    return done
}
if (project == null) {
    if (opened == null) {
        say 'open an image or a project first'
        return
    }
    importInto(opened)
} else {
    def current = opened == null ? null : project.getEntry(opened)
    project.getImageList().findAll { !it.getImageName().endsWith(' (labels)') }.each { entry ->
        def imageData = entry == current ? opened : entry.readImageData()
        if (importInto(imageData)) {
            entry.saveImageData(imageData)
        }
        if (entry != current) {
            imageData.getServer().close()
        }
    }
    if (withLabelMaps) {
        used.each { addLabelMap(project, it) }
    }
    project.syncChanges()
}
